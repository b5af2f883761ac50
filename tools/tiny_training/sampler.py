"""Sample sheets of the U-Net in training: fixed prompts, fixed noise, DDIM with guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from tools.tiny_training.job import Job
from tools.tiny_training.noise import scheduler
from torch import Tensor

from minikin.images.sheet import contact_sheet
from minikin.models import precision
from minikin.training.trainer import Trainer

PROMPTS = (
    "a photo of a cat on the beach", "a red car on a city street", "a teddy bear in a room",
    "a penguin in the snow", "a dog wearing a top hat in the forest",  # word: prompt
    "a guitar on a blue background",
    "a robot in the desert", "two apples in a meadow", "a rocket at night", "a mushroom in the forest",
    "a 3d render of a teapot on a white background", "a cat and a dog in a meadow",
    "a chair on a pink background", "a duck on the beach", "a soccer ball in the snow",
    "a cactus in the desert", "a purple rabbit in the snow", "a striped teapot in a room",
    "a sailboat by the sea", "a blue and yellow checkered backpack on a city street",
    "a robot to the left of a guitar in a room", "a tiny penguin on the beach", "a huge apple at night",
    "a flat illustration of a dog in the city", "a green chair in a meadow", "three mushrooms in the snow",
    "a purple and yellow striped cat in a meadow", "a red teapot and a blue cup",
    "a dotted rabbit in the forest", "a cat wearing a top hat at night",  # word: prompt
    "a yellow car in the desert",
    "a teddy bear and a soccer ball in a room",
)  # fmt: skip


class Encoder:
    """Tokens (B, context) to encodings (B, context, D) by the trained text encoder, without gradients."""

    def __init__(self, job: Job) -> None:
        from transformers import AutoTokenizer, CLIPTextModel

        self.device, self.context = torch.device(job.device), job.recipe.text.context
        self.bf16 = job.recipe.unet.plan.bf16
        self.tokenizer = AutoTokenizer.from_pretrained(job.need(job.tokenizer, "tokenizer"))
        text_encoder = CLIPTextModel.from_pretrained(
            job.need(job.text_encoder, "text"), use_safetensors=True, dtype=torch.float32
        )
        self.text_encoder = text_encoder.eval().requires_grad_(False).to(self.device)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        encoded = self.tokenizer(list(texts), padding="max_length", max_length=self.context, truncation=True)
        return torch.tensor(encoded["input_ids"], device=self.device)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        with precision.autocast(self.device, self.bf16):
            e: Tensor = self.text_encoder(input_ids=tokens).last_hidden_state.float()
        return e


class Painter:
    """Generates images of PROMPTS with the U-Net in training."""

    def __init__(self, job: Job, unet: Any, trainer: Trainer) -> None:
        from diffusers import AutoencoderKL

        self.unet, self.trainer, self.r = unet, trainer, job.recipe.unet
        self.encode = Encoder(job)
        self.prompts = PROMPTS[: self.r.samples]
        vae = AutoencoderKL.from_pretrained(
            job.need(job.vae, "autoencoder"), use_safetensors=True, torch_dtype=torch.float32
        )
        self.vae = vae.eval().requires_grad_(False).to(trainer.device)

    @torch.no_grad()
    def sheet(self) -> Image.Image:
        images = self.paint(self.prompts)
        return contact_sheet(images, self.prompts, columns=min(8, len(images)))

    def paint(self, prompts: Sequence[str]) -> list[Image.Image]:
        device, c = self.trainer.device, self.unet.config
        ddim = scheduler()
        ddim.set_timesteps(self.r.sample_steps)
        n = len(prompts)
        g = torch.Generator().manual_seed(7)
        x = torch.randn((n, c.in_channels, c.sample_size, c.sample_size), generator=g).to(device)
        e = self.encode(self.encode.tokens([*[""] * n, *prompts]))
        for t in ddim.timesteps:
            with self.trainer.autocast():
                out = self.unet(torch.cat([x, x]), t.to(device), e).sample.float()
            without, with_text = out.chunk(2)
            x = ddim.step(without + self.r.guidance * (with_text - without), t, x).prev_sample
        pixels = torch.cat([self.vae.decode(z).sample for z in torch.split(x, 16)]).float().clamp(-1, 1)
        arrays = pixels.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(a) for a in arrays]
