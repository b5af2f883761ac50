"""One opened base: the frozen text-to-image model and what Minikin needs to know of it.

A `Base` wraps a stock diffusers pipeline (Stable Diffusion 1, 2, XL, or `tiny`, which has the same
structure) and adds four things: prompts with concepts become encodings (`encode`), encodings
become packed keys and values (`pack`, with the concepts' edits), images become latents and back,
and an identity (`fingerprint`, `text_hash`). It owns no state that a prompt could change.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minikin.errors import BadModelFile
from minikin.models import attention
from minikin.models.identity import Origin, rounded, sketch
from minikin.models.prompt import Prompt
from minikin.models.text import Encoded, tokenized, weighted, words_in_place

ARCHITECTURES = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # by text width; anything else is tiny


@dataclass
class Base:
    """A frozen text-to-image model, opened.

    facts  what its file or folder says of itself: metadata, and "file", the name on disk
    folder where its configurations and weights lie, when it is a folder
    worn   which LoRAs are on it just now, in which strengths; "" for none
    Raises BadModelFile when the pipeline is not of a family Minikin works with.
    """

    pipe: Any
    name: str = "custom"
    licence: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    worn: str = ""
    dressed: object = None  # another one whenever the U-Net's own weights are others for a while

    def __post_init__(self) -> None:
        p = self.pipe
        self.unet, self.vae = p.unet, p.vae
        self._reading = threading.RLock()  # fast tokenizers keep padding as a state: one caller at a time
        pairs = [(p.tokenizer, p.text_encoder)]
        if getattr(p, "text_encoder_2", None) is not None:
            pairs.append((p.tokenizer_2, p.text_encoder_2))
        if any(t is None or m is None for t, m in pairs):
            raise BadModelFile(
                "This base has no text encoder or tokenizer. Minikin teaches words, so it needs them; "
                "use the full pipeline folder, not the U-Net alone."
            )
        self.tokenizers = [t for t, _ in pairs]
        self.text_encoders = [m for _, m in pairs]
        for module in self.modules:
            module.eval()
        self.layout = attention.attach(self.unet)
        # its own, whatever LoRA is on: others plan their images meanwhile
        self.has_guidance_embedding = bool(self.unet.config.get("time_cond_proj_dim"))  # full LCM

    # ---- facts -------------------------------------------------------------------------------

    @property
    def architecture(self) -> str:
        return ARCHITECTURES.get(self.layout.text_width, "tiny")

    @property
    def is_xl(self) -> bool:
        return len(self.text_encoders) > 1

    @property
    def device(self) -> torch.device:
        weight: Tensor = self.unet.conv_in.weight  # the U-Net's own property looks for hooks in every layer
        return weight.device

    @property
    def dtype(self) -> torch.dtype:
        weight: Tensor = self.unet.conv_in.weight
        return weight.dtype

    @property
    def n_tokens(self) -> int:
        return int(self.tokenizers[0].model_max_length)

    @property
    def size_px(self) -> int:
        """The side of images the base was trained on."""
        side: int = self.unet.config.sample_size * self.factor
        return side

    @property
    def factor(self) -> int:
        """Pixels for one latent position."""
        return 1 << (len(self.vae.config.block_out_channels) - 1)

    @property
    def grid(self) -> int:
        """Pixels that sides of images are multiples of, so that every level of the U-Net has whole sizes."""
        return self.factor << (len(self.unet.config.block_out_channels) - 1)

    @property
    def prediction(self) -> str:
        return str(self.pipe.scheduler.config.prediction_type)

    @cached_property
    def noise(self) -> Any:
        """The base's noise schedule for training: add_noise(x0, eps, t), get_velocity(x0, eps, t).

        Not the painting scheduler: Euler's `add_noise` leaves out the factor alpha, and others have
        no velocity.
        """
        from diffusers import DDPMScheduler

        return DDPMScheduler.from_config(self.pipe.scheduler.config)

    @property
    def is_inpainting(self) -> bool:
        """Whether the U-Net also reads a mask and a masked image (9 channels)."""
        return int(self.unet.config.in_channels) == 9

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the cross-attention projections (see `identity.rounded`) and their names.

        These are the only weights a concept touches; a fine-tune has another fingerprint.
        """
        digest = hashlib.sha256()
        for site in self.layout.sites:
            attn = self.unet.get_submodule(site.path)
            for layer in (attn.to_k, attn.to_v):
                weight = getattr(layer, "base_layer", layer).weight
                digest.update(site.path.encode() + rounded(weight))
        return digest.hexdigest()

    @property
    def text_hash(self) -> str:
        """SHA-256 of the text encoders' weights (see `identity.rounded`) and the tokenizers' words."""
        return self._text[0]

    @cached_property
    def _text(self) -> tuple[str, str]:
        """Hash and sketch of the text encoders, as they are when either is first asked for."""
        digest, weights, words = hashlib.sha256(), [], []
        for tokenizer, model in zip(self.tokenizers, self.text_encoders, strict=True):
            for name, weight in sorted(model.state_dict().items()):
                if weight.is_floating_point():
                    digest.update(name.removeprefix("text_model.").encode() + rounded(weight))
                    weights.append(weight)
            own = sorted(tokenizer.get_vocab())
            digest.update("\n".join(own).encode())
            words += own
        return digest.hexdigest(), sketch(weights, words)

    @property
    def origin(self) -> Origin:
        return Origin(self.architecture, self.fingerprint, self.text_hash, self.licence, self._text[1])

    @property
    def modules(self) -> tuple[Any, ...]:
        return (self.unet, self.vae, *self.text_encoders)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No weight of the base asks for a gradient while inside.

        Not for good: on a CPU, PyTorch computes with other kernels when weights need no gradient, and
        images would differ from the stock pipeline's in the last bit.
        """
        thawed = [p for m in self.modules for p in m.parameters() if p.requires_grad]
        for p in thawed:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in thawed:
                p.requires_grad_(True)

    # ---- text --------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[Prompt], words: Mapping[str, Sequence[Tensor]] | None = None) -> Encoded:
        """Encode prompts, with the concepts' word vectors in place of their category's.

        words  name -> per text encoder (n, d_k); a name that is missing keeps its category's words
        Gradients flow to the word vectors.
        Raises BadRecipe when a concept lies beyond the prompt's last token.
        """
        states, pooled, positions = [], None, None
        ids = torch.empty(0)
        for k, (tokenizer, model) in enumerate(zip(self.tokenizers, self.text_encoders, strict=True)):
            with self._reading:
                ids, found = tokenized(tokenizer, prompts)
            positions = positions or found
            rows = [
                (b, at, words[use.name][k])
                for b, prompt in enumerate(prompts)
                for use, at in zip(prompt.uses, found[b], strict=True)
                if words and use.name in words
            ]
            with words_in_place(model, rows):
                out = model(ids.to(self.device), output_hidden_states=self.is_xl)
            # SD 1 and 2: last layer, normed; SDXL: the layer before the last, bare
            states.append(out.hidden_states[-2] if self.is_xl else out[0])
            if self.is_xl and k == len(self.text_encoders) - 1:
                pooled = out[0]
        e = torch.cat(states, -1)
        if any(p.weights for p in prompts):
            with self._reading:
                e = weighted(e, prompts, self.tokenizers[0])
        eos = (ids == self.tokenizers[-1].eos_token_id).int().argmax(-1)
        valid = torch.arange(e.shape[1])[None] <= eos[:, None]
        assert positions is not None
        return Encoded(e, pooled, tuple(positions), valid.to(self.device))

    def count_tokens(self, text: str) -> int:
        """Tokens of a text without begin and end."""
        with self._reading:
            return len(self.tokenizers[0](text, add_special_tokens=False).input_ids)

    def word_vectors(self, text: str) -> tuple[Tensor, ...]:
        """Per text encoder (n, d_k): the token embeddings of a text, float32."""
        out = []
        for tokenizer, model in zip(self.tokenizers, self.text_encoders, strict=True):
            with self._reading:
                ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
            table = model.get_input_embeddings().weight
            out.append(table[ids.to(table.device)].detach().float().clone())
        return tuple(out)

    # ---- images ----------------------------------------------------------------------------

    @torch.no_grad()
    def to_latents(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to latents, scaled: the mean of the posterior."""
        dtype = self.vae.dtype
        try:
            if dtype != torch.float32:  # half precision costs detail, and SDXL's VAE overflows in it
                self.vae.to(torch.float32)
            mean = self.vae.encode(pixels.to(self.vae.device, torch.float32)).latent_dist.mean
        finally:
            if dtype != torch.float32:
                self.vae.to(dtype)
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        latents: Tensor = (mean - shift) * self.vae.config.scaling_factor
        return latents

    def conditions(
        self, n: int, pooled: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """What SDXL's U-Net wants besides keys and values: pooled text and sizes; {} for others."""
        if not self.is_xl:
            return {}
        if pooled is None:
            pooled = torch.zeros(1, self.text_encoders[-1].config.projection_dim)
        pooled = pooled.to(self.device, self.dtype)
        h, w = size or (self.size_px, self.size_px)
        ids = torch.tensor([[h, w, 0, 0, h, w]], device=self.device, dtype=self.dtype)
        if len(pooled) == 1:
            pooled = pooled.expand(n, -1)
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids.expand(n, -1)}}

    def zero_encoding(self) -> tuple[Tensor, Tensor]:
        """SDXL's empty prompt: zero encodings (1, N, D) and a zero pooled embedding (1, P)."""
        e = torch.zeros(1, self.n_tokens, self.layout.text_width, device=self.device)
        pooled = torch.zeros(1, self.text_encoders[-1].config.projection_dim, device=self.device)
        return e.to(self.dtype), pooled.to(self.dtype)

    @property
    def zeros_for_empty(self) -> bool:
        """Whether an empty negative prompt is a zero encoding (SDXL)."""
        return self.is_xl and bool(self.pipe.config.get("force_zeros_for_empty_prompt", False))

    def pack(self, encodings: Tensor, **kwargs: Any) -> Tensor:
        """Packed keys and values of these encodings; see `keysvalues.pack`."""
        return attention.pack(self.unet, encodings, shape=self.layout, **kwargs)
