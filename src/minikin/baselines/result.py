"""What a baseline has learned, and a base that has it on.

    with using(base, [(tom, 1.0)]):
        ... paint tom.prompt("a photo of <tom> on the beach") ...

Whatever the method, it comes to three things: new values of some of the U-Net's weights, low-rank
changes of others, and the vector of one rare word. Inside `using` they are put in place (LoRAs are added
to the weights), so that every preset, LoRA and engine paints as on a base of its own; outside, the
base is untouched bit for bit: its own tensors are set aside and put back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from minikin.errors import BadRecipe, BaseMismatch
from minikin.models.base import Base
from minikin.models.identity import Origin, same_text
from minikin.models.lora.lora_file import LowRank
from minikin.models.prompt import concept_tags, parse


@dataclass(frozen=True)
class Learned:
    """One concept, taught by a baseline.

    word     the rare word in prompts, one token of every tokenizer
    phrase   what stands for the concept in a prompt: "sks cat"
    words    per text encoder (1, d_k): the vector of `word`; () where it keeps its own
    weights  parameter of the U-Net -> its new value, float32
    pairs    layer of the U-Net -> a low-rank change of its weight, float32
    facts    how it was made
    """

    method: str
    name: str
    category: str
    word: str
    phrase: str
    origin: Origin
    words: tuple[Tensor, ...] = ()
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    pairs: Mapping[str, LowRank] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Bytes of its numbers in float32, without the headers of files."""
        pairs = [t for pair in self.pairs.values() for t in pair]
        return 4 * sum(t.numel() for t in (*self.words, *self.weights.values(), *pairs))

    def prompt(self, text: str) -> str:
        """The prompt as the method has learned to read it: <name> becomes "a sks cat".

        Articles are put in as in any prompt; all else stays as it is. Raises BadRecipe for a prompt
        that does not name the concept.
        """
        known = dict.fromkeys([*concept_tags(text), self.name], self.phrase)
        out, last = "", 0
        for m in re.finditer(rf"<(?:concept:)?{re.escape(self.name)}(?::[^<>]*)?>", text):
            before = parse(text[: m.start()], known).text
            placed = parse(text[: m.end()], known).text.removeprefix(before)  # with its article
            out += text[last : m.start()] + placed
            last = m.end()
        if not last:
            raise BadRecipe(
                f'The prompt "{text}" does not name the concept; write <{self.name}> where it is to be.'
            )
        return out + text[last:]


Wanted = Sequence[tuple[Learned, float]]


@contextmanager
def using(base: Base, wanted: Wanted) -> Iterator[None]:
    """The base with this weighted sum of what was learned on it, while inside.

    A weight w scales the change of the U-Net, W + w (W' - W); word vectors are on or off.
    Raises BaseMismatch when something was taught on another base, BadRecipe when two share their word.
    """
    _check(base, wanted)
    _ = base.fingerprint, base.text_hash  # of the plain base: computed once, and kept
    with ExitStack() as stack:
        stack.enter_context(_words_on(base, [one for one, _ in wanted]))
        stack.enter_context(_weights_on(base, wanted))
        yield


def _check(base: Base, wanted: Wanted) -> None:
    seen: dict[str, str] = {}
    for one, _ in wanted:
        # low-rank changes and words also fit fine-tunes with the same text encoder, as all LoRAs do
        same = one.origin.fingerprint == base.fingerprint or not one.weights
        text = same_text(one.origin, base.origin)
        if one.origin.architecture != base.architecture or not text or not same:
            raise BaseMismatch(
                f"'{one.name}' ({one.method}) was taught on {one.origin.architecture} "
                f"({one.origin.fingerprint[:8]}); the open base is {base.name}, {base.architecture} "
                f"({base.fingerprint[:8]}). Open the base it was made for, or teach it again on this one."
            )
        if one.word in seen:
            raise BadRecipe(
                f"'{seen[one.word]}' and '{one.name}' were both taught with the word '{one.word}' and cannot "
                "be used together. Teach one of them again with another --word."
            )
        seen[one.word] = one.name


def token_ids(base: Base, word: str) -> tuple[int, ...]:
    """Per text encoder, the token of a word. Raises BadRecipe when it takes more than one."""
    out = []
    for tokenizer in base.tokenizers:
        ids = tokenizer(word, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise BadRecipe(
                f"The word '{word}' takes {len(ids)} tokens of this base; give --word a rare word of one "
                "token, such as sks for Stable Diffusion."
            )
        out.append(int(ids[0]))
    return tuple(out)


@contextmanager
def _words_on(base: Base, learned: Sequence[Learned]) -> Iterator[None]:
    """The rare words of these have their learned vectors."""
    handles = []
    for k, model in enumerate(base.text_encoders):
        rows = {token_ids(base, one.word)[k]: one.words[k][0] for one in learned if one.words}

        def put(_module: Any, inputs: Any, output: Tensor, rows: dict[int, Tensor] = rows) -> Tensor:
            out = output.clone()
            for token, vector in rows.items():
                out[inputs[0] == token] = vector.to(out)
            return out

        if rows:
            handles.append(model.get_input_embeddings().register_forward_hook(put))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _weights_on(base: Base, wanted: Wanted) -> Iterator[None]:
    """The U-Net with its changed weights; every other tensor stays where it is."""
    parameters = dict(base.unet.named_parameters())
    names = {n for one, _ in wanted for n in (*one.weights, *(f"{layer}.weight" for layer in one.pairs))}
    own = {n: parameters[n].data for n in sorted(names)}
    hashed = base.__dict__.pop("_weights", None)  # engines name their exports by it
    before, base.dressed = base.dressed, object()
    try:
        for name, value in own.items():
            parameters[name].data = _changed(name, value, wanted)
        yield
    finally:
        for name, value in own.items():
            parameters[name].data = value
        base.dressed = before
        base.__dict__.pop("_weights", None)
        if hashed is not None:
            base.__dict__["_weights"] = hashed


def _changed(name: str, value: Tensor, wanted: Wanted) -> Tensor:
    """W + sum_j w_j (W'_j - W), in float32 until the end; exactly W' for one at weight 1."""
    new = [(one.weights[name], w) for one, w in wanted if name in one.weights]
    layer = name.removesuffix(".weight")
    pairs = [(one.pairs[layer], w) for one, w in wanted if layer in one.pairs]
    if len(new) == 1 and new[0][1] == 1 and not pairs:
        return new[0][0].to(value.device, value.dtype, copy=True)
    total = value.float()
    for other, w in new:
        total = total + w * (other.to(total) - value.float())
    for (down, up), w in pairs:
        total = total + w * (up.to(total) @ down.to(total))
    return total.to(value.dtype)
