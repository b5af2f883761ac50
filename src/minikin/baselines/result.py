"""Result of a baseline, and its use on a base.

    with using(base, [(tom, 1.0)]):
        ... paint tom.prompt("a photo of <tom> on the beach") ...

Every method comes to three things: new values of some of the U-Net's weights, low-rank changes of others,
and the vector of one rare word. Inside `using` they replace those of the base (LoRAs are added to the
weights), so that every preset, LoRA and backend works as on an ordinary base; outside, the base has its
original tensors, bit for bit.
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
from minikin.models.identity import Origin, same_text_encoder
from minikin.models.lora.lora_file import LowRank
from minikin.models.prompt import concept_tags, parse


@dataclass(frozen=True)
class BaselineResult:
    """One concept, trained by a baseline.

    word     the rare word in prompts, one token of every tokenizer
    phrase   what stands for the concept in a prompt: "sks cat"
    words    per text encoder (1, d_k): the vector of `word`; () where it keeps its own
    weights  parameter of the U-Net -> its new value, float32
    pairs    layer of the U-Net -> a low-rank change of its weight, float32
    facts    how it was trained
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
        """The prompt in the method's words: <name> becomes "a sks cat".

        Articles are put in as in any prompt; everything else stays. Raises BadRecipe for a prompt that does
        not name the concept.
        """
        phrases = dict.fromkeys([*concept_tags(text), self.name], self.phrase)
        out, last = "", 0
        for m in re.finditer(rf"<(?:concept:)?{re.escape(self.name)}(?::[^<>]*)?>", text):
            before = parse(text[: m.start()], phrases).text
            placed = parse(text[: m.end()], phrases).text.removeprefix(before)  # with its article
            out += text[last : m.start()] + placed
            last = m.end()
        if not last:
            raise BadRecipe(
                f'The prompt "{text}" does not name the concept; write <{self.name}> where it is to be.'
            )
        return out + text[last:]


Weighted = Sequence[tuple[BaselineResult, float]]


@contextmanager
def using(base: Base, results: Weighted) -> Iterator[None]:
    """While inside, the base has the weighted sum of these results.

    A weight w scales the change of the U-Net, W + w (W' - W); word vectors are on or off.
    Raises BaseMismatch for a result of another base, BadRecipe for two with the same word.
    """
    _check(base, results)
    _ = base.fingerprint, base.text_hash  # of the plain base: computed once, and kept
    with ExitStack() as stack:
        stack.enter_context(_replace_words(base, [result for result, _ in results]))
        stack.enter_context(_replace_weights(base, results))
        yield


def _check(base: Base, results: Weighted) -> None:
    by_word: dict[str, str] = {}
    for result, _ in results:
        # low-rank changes and words also fit fine-tunes with the same text encoder, as all LoRAs do
        same = result.origin.fingerprint == base.fingerprint or not result.weights
        text = same_text_encoder(result.origin, base.origin)
        if result.origin.architecture != base.architecture or not text or not same:
            raise BaseMismatch(
                f"'{result.name}' ({result.method}) was taught on {result.origin.architecture} "
                f"({result.origin.fingerprint[:8]}); the open base is {base.name}, {base.architecture} "
                f"({base.fingerprint[:8]}). Open the base it was made for, or teach it again on this one."
            )
        if result.word in by_word:
            raise BadRecipe(
                f"'{by_word[result.word]}' and '{result.name}' were both taught with the word '{result.word}' "
                "and cannot be used together. Teach one of them again with another --word."
            )
        by_word[result.word] = result.name


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
def _replace_words(base: Base, results: Sequence[BaselineResult]) -> Iterator[None]:
    """Inside, the rare words of these results have their trained vectors."""
    handles = []
    for k, model in enumerate(base.text_encoders):
        rows = {token_ids(base, result.word)[k]: result.words[k][0] for result in results if result.words}

        def replace_rows(_module: Any, inputs: Any, output: Tensor, rows: dict[int, Tensor] = rows) -> Tensor:
            out = output.clone()
            for token, vector in rows.items():
                out[inputs[0] == token] = vector.to(out)
            return out

        if rows:
            handles.append(model.get_input_embeddings().register_forward_hook(replace_rows))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replace_weights(base: Base, results: Weighted) -> Iterator[None]:
    """Inside, the U-Net has the changed weights; every other tensor stays in place."""
    parameters = dict(base.denoiser.named_parameters())
    names = {n for result, _ in results for n in result.weights}
    names |= {f"{layer}.weight" for result, _ in results for layer in result.pairs}
    originals = {n: parameters[n].data for n in sorted(names)}
    module_hash = base.__dict__.pop("_weights", None)  # backends name their exports by it
    before, base.weights_version = base.weights_version, object()
    try:
        for name, value in originals.items():
            parameters[name].data = _changed(name, value, results)
        yield
    finally:
        for name, value in originals.items():
            parameters[name].data = value
        base.weights_version = before
        base.__dict__.pop("_weights", None)
        if module_hash is not None:
            base.__dict__["_weights"] = module_hash


def _changed(name: str, value: Tensor, results: Weighted) -> Tensor:
    """W + sum_j w_j (W'_j - W), in float32 until the end; exactly W' for a single result at weight 1."""
    replaced = [(result.weights[name], w) for result, w in results if name in result.weights]
    layer = name.removesuffix(".weight")
    pairs = [(result.pairs[layer], w) for result, w in results if layer in result.pairs]
    if len(replaced) == 1 and replaced[0][1] == 1 and not pairs:
        return replaced[0][0].to(value.device, value.dtype, copy=True)
    total = value.float()
    for other, w in replaced:
        total = total + w * (other.to(total) - value.float())
    for (down, up), w in pairs:
        total = total + w * (up.to(total) @ down.to(total))
    return total.to(value.dtype)
