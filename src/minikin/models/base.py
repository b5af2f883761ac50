"""The base model: a frozen diffusers pipeline and what Minikin adds to it.

A `Base` wraps a stock pipeline of one of the families in `models.families`. It encodes prompts with
concepts (`encode`), computes packed keys and values from the encodings (`pack`), calls the denoiser with them
(`predict`), encodes images to latents (`to_latents`), and identifies the model (`fingerprint`, `text_hash`).
A prompt changes no state of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minikin.errors import BadRecipe
from minikin.models import attention, families
from minikin.models.identity import Origin, rounded, sketch
from minikin.models.prompt import Prompt
from minikin.models.schedule import NoiseSchedule, noise_schedule
from minikin.models.text import Encoded
from minikin.models.text_encoders import text_encoders


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
        pipe = self.pipe
        families.refuse(type(pipe).__name__, "This pipeline")
        self.denoiser = families.denoiser_of(pipe)
        self.vae = pipe.vae
        self.layout = attention.layout(self.denoiser)
        self.family = families.family(type(pipe).__name__, self.layout.text_width)
        self.text = text_encoders(pipe, self.family)
        self.tokenizers, self.text_encoders = self.text.tokenizers, self.text.models
        for module in self.modules:
            module.eval()
        attention.attach(self.denoiser)
        # read once: a LoRA that is applied may change the configuration while another thread resolves a request
        self.has_guidance_embedding = self.guidance_is_input  # full LCM, SANA-Sprint

    def __repr__(self) -> str:
        kind, dtype = type(self.pipe).__name__, str(self.dtype).removeprefix("torch.")
        return f"<{self.name}: {kind}, {self.architecture}, {dtype} on {self.device}>"

    # ---- facts -------------------------------------------------------------------------------

    @property
    def architecture(self) -> str:
        return self.family.name

    @property
    def is_unet(self) -> bool:
        """False for a base that denoises with a transformer."""
        return self.family.denoiser == "unet"

    def require_unet(self, task: str) -> None:
        """Raise BadRecipe on a base that denoises with a transformer.

        task  that needs a U-Net, the beginning of a sentence
        """
        if not self.is_unet:
            raise BadRecipe(
                f"{task} works with U-Nets (Stable Diffusion 1, 2, XL and tiny), and '{self.name}' "
                f"({self.architecture}) denoises with a transformer. Open a base with a U-Net."
            )

    @property
    def guidance_is_input(self) -> bool:
        """True if the denoiser, as it is now, takes the guidance scale as an input."""
        config = self.denoiser.config
        return bool(config.get("time_cond_proj_dim") or config.get("guidance_embeds"))

    @property
    def is_xl(self) -> bool:
        return len(self.text_encoders) > 1

    @property
    def device(self) -> torch.device:
        weight: Tensor = next(self.denoiser.parameters())  # its `device` would look for hooks in every layer
        return weight.device

    @property
    def dtype(self) -> torch.dtype:
        weight: Tensor = next(self.denoiser.parameters())
        return weight.dtype

    @property
    def latent_dtype(self) -> torch.dtype:
        """Of latents while an image is sampled: float32 for flow matching, as in the stock pipelines."""
        return torch.float32 if self.schedule.is_flow else self.dtype

    @property
    def n_tokens(self) -> int:
        """Tokens of an encoding in one window, with special ones."""
        return self.family.tokens or int(self.tokenizers[0].model_max_length)

    @property
    def size_px(self) -> int:
        """Side in pixels of the images that the base was trained on."""
        side: int = self.denoiser.config.sample_size * self.vae_scale_factor
        return side

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent position."""
        config = self.vae.config
        levels = config.get("encoder_block_out_channels") or config.block_out_channels  # of AutoencoderDC first
        return 1 << (len(levels) - 1)

    @property
    def size_multiple(self) -> int:
        """Sides of images in pixels are multiples of this, so that every level or patch has a whole size."""
        config = self.denoiser.config
        if self.is_unet:
            return self.vae_scale_factor << (len(config.block_out_channels) - 1)
        return self.vae_scale_factor * int(config.patch_size)

    @property
    def prediction_type(self) -> str:
        """epsilon, v_prediction or flow_prediction, as diffusers names them."""
        return self.schedule.prediction_type

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule that the base was trained with."""
        return noise_schedule(self.pipe.scheduler.config)

    @property
    def is_inpainting(self) -> bool:
        """True for inpainting models, whose U-Net also reads a mask and a masked image (9 channels)."""
        return int(self.denoiser.config.in_channels) == 9

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the cross-attention projections (see `identity.rounded`) and their names.

        A concept edits these weights only. A fine-tune has another fingerprint.
        """
        digest = hashlib.sha256()
        for layer in self.layout.layers:
            attn = self.denoiser.get_submodule(layer.path)
            for projection in (attn.to_k, attn.to_v):
                weight = getattr(projection, "base_layer", projection).weight
                digest.update(layer.path.encode() + rounded(weight))
        return digest.hexdigest()

    @property
    def text_hash(self) -> str:
        """SHA-256 of the text encoders' weights (see `identity.rounded`) and the tokenizers' words.

        With those of a transformer's projection of the text, which the edit of a concept acts after.
        """
        return self._text[0]

    @cached_property
    def _text(self) -> tuple[str, str]:
        """Hash and sketch of the text encoders, computed on first use."""
        digest, weights, words = hashlib.sha256(), [], []

        def add(model: Any) -> None:
            for name, weight in sorted(model.named_parameters()):  # those that are used twice count once
                digest.update(name.removeprefix("text_model.").encode() + rounded(weight))
                weights.append(weight)

        for projection in attention.text_projection(self.denoiser):
            add(projection)
        for tokenizer, model in zip(self.tokenizers, self.text_encoders, strict=True):
            add(model)
            vocabulary = sorted(tokenizer.get_vocab())
            digest.update("\n".join(vocabulary).encode())
            words += vocabulary
        return digest.hexdigest(), sketch(weights, words)

    @property
    def origin(self) -> Origin:
        return Origin(self.architecture, self.fingerprint, self.text_hash, self.licence, self._text[1])

    @property
    def modules(self) -> tuple[Any, ...]:
        return (self.denoiser, self.vae, *self.text_encoders)

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
        encoded = self.text.encode(
            prompts, words, device=self.device, chunks=chunks, clip_skip=clip_skip, second=second
        )
        return encoded._replace(e=self.project(encoded.e))

    def project(self, encodings: Tensor) -> Tensor:
        """The text encoder's encodings as the cross-attention layers read them; see `attention.project`."""
        return attention.project(self.denoiser, encodings)

    @property
    def trained_clip_skip(self) -> int:
        """Counted from the last layer of the text encoder, the one that the denoiser was trained with."""
        return self.text.trained_clip_skip

    def check_clip_skip(self, clip_skip: int) -> None:
        """Raise BadRecipe for a layer that the text encoder does not have."""
        self.text.check_clip_skip(clip_skip, self.name)

    def count_chunks(self, prompt: Prompt) -> int:
        """Number of windows of tokens in which a prompt is read, at least 1."""
        return min(self.needed_chunks(prompt), self.text.max_chunks)

    def needed_chunks(self, prompt: Prompt) -> int:
        """Number of windows of tokens that all of a prompt fills."""
        return self.text.needed_chunks(prompt)

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a text, without special ones."""
        return self.text.count_tokens(text)

    def word_vectors(self, text: str) -> tuple[Tensor, ...]:
        """Token embeddings of a text, per text encoder (n, d_k), float32."""
        return self.text.word_vectors(text)

    # ---- images ----------------------------------------------------------------------------

    @torch.no_grad()
    def to_latents(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, H, W) in [-1, 1] to scaled latents: the mean of the VAE's posterior.

        AutoencoderDC has no posterior, but one encoding.
        """
        dtype = self.vae.dtype
        try:
            if dtype != torch.float32:  # half precision loses detail, and SDXL's VAE overflows in it
                self.vae.to(torch.float32)
            encoded = self.vae.encode(pixels.to(self.vae.device, torch.float32))
            mean = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mean
        finally:
            if dtype != torch.float32:
                self.vae.to(dtype)
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        latents: Tensor = (mean - shift) * self.vae.config.scaling_factor
        return latents

    def predict(
        self, x: Tensor, t: Tensor, kv: Tensor, *, pooled: Tensor | None = None, mask: Tensor | None = None,
        size: tuple[int, int] | None = None, guidance_embedding: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The denoiser's prediction (B, C, h, w) for noisy latents x at timesteps t, () or (B,).

        kv      (B, N, W) packed keys and values; pooled and mask as `encode` gave them
        size    (height, width) of the image in pixels; the base's own by default
        A learned variance, which half of PixArt's channels are, is cut off, as in the stock pipelines.
        """
        more: dict[str, Any] = self.added_conditions(len(x), pooled, size)
        if not self.is_unet:
            t, more["encoder_attention_mask"] = t.expand(len(x)), mask
            t = t * self.denoiser.config.get("timestep_scale", 1)
            if guidance_embedding is None:  # masks from attention have no scale of their own
                guidance_embedding = self.guidance_embedding(self.family.guidance, len(x))
        if guidance_embedding is not None:
            more["timestep_cond" if self.is_unet else "guidance"] = guidance_embedding
        out: Tensor = self.denoiser(
            x.to(self.dtype), timestep=t, encoder_hidden_states=kv, return_dict=False, **more
        )[0]
        channels = int(self.vae.config.latent_channels)
        return (out[:, :channels] if out.shape[1] == 2 * channels else out).to(x.dtype)

    def guidance_embedding(self, scale: float, n: int) -> Tensor | None:
        """The guidance scale as the denoiser reads it, for n images; None where it is no input.

        (n, D) for full latent consistency models, (n,) for SANA-Sprint.
        """
        config = self.denoiser.config
        if (width := config.get("time_cond_proj_dim")) is not None:
            embedding: Tensor = self.pipe.get_guidance_scale_embedding(
                torch.tensor(scale - 1).repeat(n), embedding_dim=width
            )
            return embedding.to(device=self.device, dtype=self.dtype)
        if not config.get("guidance_embeds"):
            return None
        scales: Tensor = (
            torch.full([n], scale, device=self.device).to(self.dtype) * config.guidance_embeds_scale
        )
        return scales

    def added_conditions(
        self, n: int, pooled: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """The denoiser's `added_cond_kwargs` for a batch of n; {} for families without.

        size  (height, width) in pixels
        """
        sizes = self.size_conditions(n, size or (self.size_px, self.size_px))
        if self.is_xl:
            if pooled is None:
                pooled = torch.zeros(1, self.text_encoders[-1].config.projection_dim)
            pooled = pooled.to(self.device, self.dtype)
            sizes["text_embeds"] = pooled.expand(n, -1) if len(pooled) == 1 else pooled
        return {"added_cond_kwargs": sizes} if sizes else {}

    def size_conditions(self, n: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """Of `added_conditions`, those of the size (height, width): of SDXL, and of PixArt-alpha at 1024 px."""
        h, w = size
        values: dict[str, list[float]] = {}
        if self.is_xl:
            values = {"time_ids": [h, w, 0, 0, h, w]}
        elif getattr(self.denoiser, "use_additional_conditions", False):
            values = {"resolution": [h, w], "aspect_ratio": [h / w]}
        return {
            name: torch.tensor([row], device=self.device, dtype=self.dtype).expand(n, -1)
            for name, row in values.items()
        }

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
        return attention.pack(self.denoiser, encodings, shape=self.layout, **kwargs)
