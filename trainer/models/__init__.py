"""The models, written for one device: no file here knows about processes, meshes or shards.

    vlm        composition and fit to a data set
    encoder    the vision encoder that a config asks for   [B*N, L, P] uint8 -> z_NLE
      siglip2, aimv2, dinov3     one file each; vision holds their contract and what they share
    projector  m x m merge and MLP                         z_NLE -> visual tokens [B*N*L/m^2, D]
    decoder    Llama 3 or Qwen3                            h_BSD -> h_BSD, and the head's weight
    layers     blocks that encoders and decoders share
    presets    sizes of published checkpoints
    init       initial weights, a function of (seed, parameter name) alone

Modules inside a layer carry the parameter names of Hugging Face, so that import and export rename prefixes.
Layers are keyed by their global index and missing parts are passed through: a pipeline stage is the same
model with parts taken out.
"""
