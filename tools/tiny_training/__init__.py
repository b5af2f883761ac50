"""Training of the embedded model from nothing: `python -m tools.tiny_training --world small`.

Named stages, each of which goes on where it stopped, on a CPU or a GPU:

    images     rendered scenes, kept on disk                      pictures.py
    autoencoder  pixels <-> latents: factor 8, then grown to 16     autoencoder.py, normalise.py
    tokenizer    byte-level BPE in CLIP's format                    tokenizer.py
    text         the text tower, from captions alone                text.py, truth.py
    latents      the images as latents, their captions as tokens  latents.py
    unet         the diffusion model                                unet.py, noise.py
    export       an ordinary diffusers folder                       export.py
    judge, classifier   the models that measure its images        judge.py, classifier.py

Every trained stage is one `run.Run`; every number of every stage is in recipes.py. art.py makes the
art pack that the scenes are drawn from.
"""
