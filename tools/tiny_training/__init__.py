"""Training of the embedded model from nothing: `python -m tools.tiny_training --world small`.

Stages, each of which resumes where it stopped, on a CPU or a GPU:

    images        rendered scenes, cached on disk                      images.py, things.py, patterns.py
    autoencoder   pixels <-> latents                                   autoencoder.py, neutral.py, normalise.py
    tokenizer     byte-level BPE in CLIP's format                      tokenizer.py
    text          the text encoder, from captions alone                text.py, labels.py
    latents       the images as latents, their captions as tokens      latents.py
    unet          the diffusion model                                  unet.py, noise.py
    export        a diffusers folder                                   export.py
    adapters      few-step LoRAs                                       adapters.py, in_domain_concepts.py
    dual-encoder  image and text encoder that evaluate its images      dual_encoder.py
    classifier    classifier that evaluates its images                 classifier.py

Every trained stage uses the package's `Trainer`; all numbers are in recipes.py. art.py makes the pack of
drawings that scenes are drawn from, evaluate.py measures a finished model.
"""
