"""The published scheduler_config.json of the bases, as they lie on the Hugging Face hub (scheduler/ in each).

Values that a file does not state are defaults of its class; `X.from_config` of another class takes its own.
Compared with copies of the files in public repositories, named below; where none was found it says so.
"""

from __future__ import annotations

from typing import Any

_BETAS: dict[str, Any] = {
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
    "trained_betas": None, "clip_sample": False, "steps_offset": 1, "skip_prk_steps": True,
}  # fmt: skip
_SGM: dict[str, Any] = _BETAS | {
    "interpolation_type": "linear", "prediction_type": "epsilon", "sample_max_value": 1.0,
    "set_alpha_to_one": False, "use_karras_sigmas": False,
}  # fmt: skip

PUBLISHED_SCHEDULERS: dict[str, dict[str, Any]] = {
    # stable-diffusion-v1-5/stable-diffusion-v1-5; copy: github.com/VoltaML/voltaML-fast-stable-diffusion
    "sd15": _BETAS | {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "set_alpha_to_one": False},
    # stabilityai/stable-diffusion-2-1; copy of the values: github.com/Vikas-2025/Hugging_face_sta_dif_2.1
    "sd21": _BETAS | {"_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "set_alpha_to_one": False,
                      "prediction_type": "v_prediction"},
    # stabilityai/stable-diffusion-2-1-base; copy: github.com/jack-op11/stable-diffusion-2-1-base
    "sd21-base": _BETAS | {"_class_name": "PNDMScheduler", "_diffusers_version": "0.10.0.dev0",
                           "set_alpha_to_one": False, "prediction_type": "epsilon"},
    # stabilityai/stable-diffusion-xl-base-1.0; copy: github.com/reo224/LoRA_Diffusers
    "sdxl": _SGM | {"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0",
                    "timestep_spacing": "leading"},
    # stabilityai/sd-turbo; NOT COMPARED: no copy was found, the values are those of sdxl-turbo with this class
    "sd-turbo": _SGM | {"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.24.0.dev0",
                        "timestep_spacing": "trailing"},
    # stabilityai/sdxl-turbo; copy: github.com/Guang000/Generative-Dataset-Distillation-Based-on-Diffusion-Model
    "sdxl-turbo": {k: v for k, v in _SGM.items() if k != "use_karras_sigmas"}
    | {"_class_name": "EulerAncestralDiscreteScheduler", "_diffusers_version": "0.24.0.dev0",
       "timestep_spacing": "trailing"},
    # SimianLuo/LCM_Dreamshaper_v7; NOT COMPARED: no copy was found, the values are from memory
    "lcm-sd15": {
        "_class_name": "LCMScheduler", "_diffusers_version": "0.22.0.dev0", "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
        "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.995, "num_train_timesteps": 1000,
        "original_inference_steps": 50, "prediction_type": "epsilon", "rescale_betas_zero_snr": False,
        "sample_max_value": 1.0, "set_alpha_to_one": True, "steps_offset": 1, "thresholding": False,
        "timestep_spacing": "leading", "trained_betas": None,
    },
}  # fmt: skip


def published(name: str) -> Any:
    """The scheduler that diffusers makes of a published file."""
    import diffusers

    config = PUBLISHED_SCHEDULERS[name]
    return getattr(diffusers, config["_class_name"]).from_config(config)
