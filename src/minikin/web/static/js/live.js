// @ts-check
// Live generation: one request at a time is sent to /api/live, the newest when the last image has arrived.
// If every key were sent at once, each would cancel the last image, and fast typing would show none before a
// pause. While typing is faster than generation, requests use `hurried` settings with fewer steps; the last
// request uses all steps.

const PATIENCE_MS = 3000; // then the next request goes without an answer to the last
const WAIT_MS = 1000; // then the page says why nothing comes

export class Live {
  /**
   * @param {(message: any) => void} shown  hears each image
   * @param {(text: string, prompt?: string) => void} problem  prompt: of the request that it is about
   * @param {() => void} waits  is called every second while an answer is missing
   * @param {string} again  what opens a lost connection again
   */
  constructor(shown, problem, waits, again = "type on") {
    this.shown = shown;
    this.problem = problem;
    this.waits = waits;
    this.again = again;
    this.sent = /** @type {Record<string, any>} */ ({}); // the server keeps what it was told
    this.socket = /** @type {WebSocket | null} */ (null);
    this.since = 0;
    this.timer = 0;
  }
  request(recipe, hurried = {}) {
    this.recipe = recipe;
    this.hurried = hurried;
    this.late = this.since > 0; // the image of an older request is not here yet
    if (this.socket?.readyState === WebSocket.OPEN) this.#send();
    else if (!this.socket || this.socket.readyState > WebSocket.OPEN) this.#open();
  }
  close() {
    clearInterval(this.timer);
    if (this.socket) this.socket.onclose = this.socket.onmessage = null;
    this.socket?.close();
    this.socket = null;
  }
  #open() {
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    this.socket = new WebSocket(`${scheme}://${location.host}/api/live`);
    this.sent = {};
    this.since = 0;
    this.socket.onopen = () => this.#send();
    this.socket.onmessage = e => {
      const message = JSON.parse(e.data), {prompt} = this.sent;
      this.since = 0;
      clearInterval(this.timer);
      this.#send();
      this.problem(message.problem ?? "", prompt);
      if (!message.problem) this.shown(message);
    };
    this.socket.onclose = e => {
      clearInterval(this.timer);
      if (e.code >= 4000) this.problem(e.reason || "Live painting is not possible just now.");
      else if (e.code === 1006) this.problem(`The connection was lost; ${this.again} to open it again.`);
    };
  }
  #send() {
    if (this.since && performance.now() - this.since < PATIENCE_MS) return;
    const recipe = this.late ? {...this.recipe, ...this.hurried} : this.recipe;
    const changed = Object.fromEntries(Object.entries(recipe).filter(
      ([k, v]) => JSON.stringify(this.sent[k]) !== JSON.stringify(v)));
    if (!Object.keys(changed).length) return;
    this.late = false;
    this.sent = {...recipe};
    this.since = performance.now();
    this.socket?.send(JSON.stringify(changed));
    clearInterval(this.timer);
    this.timer = setInterval(() => this.waits(), WAIT_MS);
  }
}
