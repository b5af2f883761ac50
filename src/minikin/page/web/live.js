// Painting live: the newest wish goes to /api/live; one that was replaced is never painted.

export class Live {
  constructor(shown, problem) { this.shown = shown; this.problem = problem; this.sent = {}; this.socket = null; this.quiet = 0; }
  wish(recipe) {
    this.wanted = recipe;
    if (this.socket?.readyState === WebSocket.OPEN) this.#send();
    else if (!this.socket || this.socket.readyState > WebSocket.OPEN) this.#open();
  }
  #open() {
    const way = location.protocol === "https:" ? "wss" : "ws";
    this.socket = new WebSocket(`${way}://${location.host}/api/live`);
    this.sent = {};
    this.socket.onopen = () => this.#send();
    this.socket.onmessage = e => {
      const told = JSON.parse(e.data);
      if (told.problem) this.problem(told.problem); else { this.problem(""); this.shown(told); }
    };
    this.socket.onclose = e => {
      if (e.code >= 4000) this.problem(e.reason || "Live painting is not possible just now.");
      else if (e.code === 1006) this.problem("The connection was lost; type on to open it again.");
    };
  }
  #send() { // what changed; the server keeps the rest
    const changed = Object.fromEntries(Object.entries(this.wanted).filter(([k, v]) => JSON.stringify(this.sent[k]) !== JSON.stringify(v)));
    if (!Object.keys(changed).length) return;
    this.sent = {...this.wanted};
    this.socket.send(JSON.stringify(changed));
  }
}
