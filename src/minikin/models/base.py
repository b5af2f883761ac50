"""The base model: a frozen diffusers pipeline and what Minikin adds to it.

A `Base` wraps a stock pipeline of Stable Diffusion 1, 2 or XL, or of `tiny`, which has the same
structure. It encodes prompts with concepts (`encode`), computes packed keys and values from the
encodings (`pack`), encodes images to latents (`to_latents`), and identifies the model (`fingerprint`,
`text_hash`). A prompt changes no state of it.
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

from minikin.errors import BadModelFile, BadRecipe
from minikin.models import attention
from minikin.models.identity import Origin, rounded, sketch
from minikin.models.prompt import Prompt
from minikin.models.text import (
    MAX_CHUNKS,
    Encoded,
    apply_emphasis,
    chunk_tokens,
    emphasis,
    hidden_state,
    tokenize,
    word_vectors_replaced,
)

ARCHITECTURES = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # by text width; anything else is tiny


@dataclass(repr=False)
class Base:
    """An opened text-to-image model.

    pipe             the diffusers pipeline
    metadata         metadata of its file or folder, and "file", the name on disk
    folder           folder with its configurations and weights, if there is one
    active_adapters  hashes and weights of the LoRAs that are applied now; "" for none
    weights_version  another object whenever the U-Net's weights are replaced for a while
    Raises BadModelFile when the pipeline is not of a family that Minikin supports.
    """

    pipe: Any
    name: str = "custom"
    licence: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    active_adapters: str = ""
    weights_version: object = None

    def __post_init__(self) -> None:
        p = self.pipe
        self.unet, self.vae = p.unet, p.vae
        self._tokenizer_lock = threading.RLock()  # fast tokenizers keep the padding as state
        pairs = [(p.tokenizer, p.text_encoder)]
        if getattr(p, "text_encoder_2", None) is not None:
            pairs.append((p.tokenizer_2, p.text_encoder_2))
        if any(t is None or m is None for t, m in pairs):
            raise BadModelFile(
                "This base has no text encoder or tokenizer. Minikin needs them to train word vectors; "
                "use the full pipeline folder, not the U-Net alone."
            )
        self.tokenizers = [t for t, _ in pairs]
        self.text_encoders = [m for _, m in pairs]
        for module in self.modules:
            module.eval()
        self.layout = attention.attach(self.unet)
        # read once: a LoRA that is applied may change the configuration while another thread resolves a request
        self.has_guidance_embedding = bool(self.unet.config.get("time_cond_proj_dim"))  # full LCM

    def __repr__(self) -> str:
        kind, dtype = type(self.pipe).__name__, str(self.dtype).removeprefix("torch.")
        return f"<{self.name}: {kind}, {self.architecture}, {dtype} on {self.device}>"

    # ---- facts -------------------------------------------------------------------------------

    @property
    def architecture(self) -> str:
        return ARCHITECTURES.get(self.layout.text_width, "tiny")

    @property
    def is_xl(self) -> bool:
        return len(self.text_encoders) > 1

    @property
    def device(self) -> torch.device:
        weight: Tensor = self.unet.conv_in.weight  # `unet.device` would look for hooks in every layer
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
        """Side in pixels of the images that the base was trained on."""
        side: int = self.unet.config.sample_size * self.vae_scale_factor
        return side

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent position."""
        return 1 << (len(self.vae.config.block_out_channels) - 1)

    @property
    def size_multiple(self) -> int:
        """Sides of images in pixels are multiples of this, so that every level of the U-Net has whole sizes."""
        return self.vae_scale_factor << (len(self.unet.config.block_out_channels) - 1)

    @property
    def prediction_type(self) -> str:
        """epsilon or v_prediction, as diffusers names them."""
        return str(self.pipe.scheduler.config.prediction_type)

    @cached_property
    def training_scheduler(self) -> Any:
        """The base's noise schedule as a DDPM scheduler: add_noise(x0, eps, t), get_velocity(x0, eps, t).

        The pipeline's scheduler does not serve for training: Euler's `add_noise` leaves out the factor
        alpha, and others have no velocity.
        """
        from diffusers import DDPMScheduler

        return DDPMScheduler.from_config(self.pipe.scheduler.config)

    @property
    def is_inpainting(self) -> bool:
        """True for inpainting models, whose U-Net also reads a mask and a masked image (9 channels)."""
        return int(self.unet.config.in_channels) == 9

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the cross-attention projections (see `identity.rounded`) and their names.

        A concept edits these weights only. A fine-tune has another fingerprint.
        """
        digest = hashlib.sha256()
        for layer in self.layout.layers:
            attn = self.unet.get_submodule(layer.path)
            for projection in (attn.to_k, attn.to_v):
                weight = getattr(projection, "base_layer", projection).weight
                digest.update(layer.path.encode() + rounded(weight))
        return digest.hexdigest()

    @property
    def text_hash(self) -> str:
        """SHA-256 of the text encoders' weights (see `identity.rounded`) and the tokenizers' words."""
        return self._text[0]

    @cached_property
    def _text(self) -> tuple[str, str]:
        """Hash and sketch of the text encoders, computed on first use."""
        digest, weights, words = hashlib.sha256(), [], []
        for tokenizer, model in zip(self.tokenizers, self.text_encoders, strict=True):
            for name, weight in sorted(model.state_dict().items()):
                if weight.is_floating_point():
                    digest.update(name.removeprefix("text_model.").encode() + rounded(weight))
                    weights.append(weight)
            vocabulary = sorted(tokenizer.get_vocab())
            digest.update("\n".join(vocabulary).encode())
            words += vocabulary
        return digest.hexdigest(), sketch(weights, words)

    @property
    def origin(self) -> Origin:
        return Origin(self.architecture, self.fingerprint, self.text_hash, self.licence, self._text[1])

    @property
    def modules(self) -> tuple[Any, ...]:
        return (self.unet, self.vae, *self.text_encoders)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Context in which no weight of the base requires a gradient.

        The flags are restored afterwards: on a CPU, PyTorch uses other kernels for weights that need no
        gradient, and images would differ from the stock pipeline's in the last bit.
        """
        trainable = [p for m in self.modules for p in m.parameters() if p.requires_grad]
        for p in trainable:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in trainable:
                p.requires_grad_(True)

    # ---- text --------------------------------------------------------------------------------

    def encode(
        self,
        prompts: Sequence[Prompt],
        words: Mapping[str, Sequence[Tensor]] | None = None,
        *,
        chunks: int = 1,
        clip_skip: int = 1,
        second: Sequence[Prompt] | None = None,
    ) -> Encoded:
        """Encode prompts, with the word vectors of concepts in place of those of their categories.

        words      concept name -> per text encoder (n, d_k); a concept without an entry keeps its category's
        chunks     windows of tokens that are encoded one by one and concatenated (`count_chunks`)
        clip_skip  as in A1111: 1 is the text encoder's last layer, 2 the one before (`check_clip_skip`)
        second     prompts of SDXL's second text encoder, where they are others; `positions` are the first's
        Gradients flow to the word vectors.
        Raises BadRecipe when a concept stands after the last token that is read.
        """
        states, pooled, positions, n = [], None, None, self.n_tokens
        tokens = None
        weighted = any(p.weights for p in (*prompts, *(second or ())))
        norm, layer = not self.is_xl, self._layer(clip_skip)
        for k, (tokenizer, model) in enumerate(zip(self.tokenizers, self.text_encoders, strict=True)):
            texts = second if k and second else prompts
            with self._tokenizer_lock:
                tokens = tokenize(tokenizer, texts, chunks)
            positions = positions or tokens.positions
            replacements = [
                (b * chunks + at[0] // n, tuple(i % n for i in at), words[use.name][k])
                for b, prompt in enumerate(texts)
                for use, at in zip(prompt.uses, tokens.positions[b], strict=True)
                if words and use.name in words
            ]
            with word_vectors_replaced(model, replacements):
                out = model(tokens.ids.to(self.device), output_hidden_states=not norm or layer > 1)
            state = hidden_state(out, model, layer, norm)
            if weighted:
                state = apply_emphasis(state, emphasis(tokens, texts))
            states.append(state)
            if self.is_xl and k == len(self.text_encoders) - 1:
                pooled = out[0][::chunks]  # of the first chunk, as in A1111 and ComfyUI
        e = torch.cat(states, -1).to(self.device)  # elsewhere under enable_model_cpu_offload
        assert positions is not None
        assert tokens is not None
        eos = (tokens.ids == self.tokenizers[-1].eos_token_id).int().argmax(-1)
        valid = torch.arange(e.shape[1])[None] <= eos[:, None]
        e, valid = (x.reshape(len(prompts), -1, *x.shape[2:]) for x in (e, valid))
        return Encoded(e, pooled, tuple(positions), valid.to(self.device))

    @property
    def trained_clip_skip(self) -> int:
        """Counted from the last layer, the one the U-Net was trained with: 2 for SD 2 and SDXL.

        SD 2's text encoder is stored without the layer after it.
        """
        return 2 if self.is_xl or self.architecture == "sd2" else 1

    def check_clip_skip(self, clip_skip: int) -> None:
        """Raise BadRecipe for a layer that the text encoder does not have."""
        layers = min(int(m.config.num_hidden_layers) for m in self.text_encoders)
        most = layers + (self.trained_clip_skip - 1 if not self.is_xl else 0)
        if clip_skip > most:
            raise BadRecipe(
                f"clip_skip {clip_skip} asks for a layer that the text encoder of '{self.name}' does not have: "
                f"it is at most {most}."
            )

    def _layer(self, clip_skip: int) -> int:
        """The layer of a clip skip, counted from the last one there is; never above the trained one."""
        layer = max(clip_skip, self.trained_clip_skip)
        return layer if self.is_xl else layer - self.trained_clip_skip + 1

    def count_chunks(self, prompt: Prompt) -> int:
        """Number of windows of tokens in which a prompt is read, at least 1 and at most MAX_CHUNKS."""
        return min(self.needed_chunks(prompt), MAX_CHUNKS)

    def needed_chunks(self, prompt: Prompt) -> int:
        """Number of windows of tokens that all of a prompt fills."""
        with self._tokenizer_lock:
            return max(len(chunk_tokens(tokenizer, prompt)) for tokenizer in self.tokenizers)

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a text, without BOS and EOS."""
        with self._tokenizer_lock:
            return len(self.tokenizers[0](text, add_special_tokens=False).input_ids)

    def word_vectors(self, text: str) -> tuple[Tensor, ...]:
        """Token embeddings of a text, per text encoder (n, d_k), float32."""
        out = []
        for tokenizer, model in zip(self.tokenizers, self.text_encoders, strict=True):
            with self._tokenizer_lock:
                ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
            table = model.get_input_embeddings().weight
            out.append(table[ids.to(table.device)].detach().float().clone())
        return tuple(out)

    # ---- images ----------------------------------------------------------------------------

    @torch.no_grad()
    def to_latents(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, H, W) in [-1, 1] to scaled latents: the mean of the VAE's posterior."""
        dtype = self.vae.dtype
        try:
            if dtype != torch.float32:  # half precision loses detail, and SDXL's VAE overflows in it
                self.vae.to(torch.float32)
            mean = self.vae.encode(pixels.to(self.vae.device, torch.float32)).latent_dist.mean
        finally:
            if dtype != torch.float32:
                self.vae.to(dtype)
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        latents: Tensor = (mean - shift) * self.vae.config.scaling_factor
        return latents

    def added_conditions(
        self, n: int, pooled: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """SDXL's `added_cond_kwargs` for a batch of n: pooled text and time ids; {} for other families.

        size  (height, width) in pixels
        """
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

    def zero_encoding(self, chunks: int = 1) -> tuple[Tensor, Tensor]:
        """SDXL's empty prompt: zero encodings (1, chunks * N, D) and a zero pooled embedding (1, P)."""
        e = torch.zeros(1, chunks * self.n_tokens, self.layout.text_width, device=self.device)
        pooled = torch.zeros(1, self.text_encoders[-1].config.projection_dim, device=self.device)
        return e.to(self.dtype), pooled.to(self.dtype)

    @property
    def zeros_for_empty(self) -> bool:
        """True if an empty negative prompt is a zero encoding (SDXL)."""
        return self.is_xl and bool(self.pipe.config.get("force_zeros_for_empty_prompt", False))

    def pack(self, encodings: Tensor, **kwargs: Any) -> Tensor:
        """Packed keys and values of these encodings; see `attention.pack`."""
        return attention.pack(self.unet, encodings, shape=self.layout, **kwargs)
