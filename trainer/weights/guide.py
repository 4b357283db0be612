"""What an export says about its inputs: preprocessor_config.json for transformers, README.md for people.

The image processor of transformers for SigLIP2 makes our patches exactly, in raster order as its tower wants them.
It resizes as we do in one case only; in all others resizing is switched off in it, and a picture whose sides are no
multiples of the patch is then an error there instead of another picture than in training.
"""

from __future__ import annotations

from pathlib import Path

from shared.dataset import DataSet
from shared.files import write_json
from shared.geometry import Geometry
from shared.tokens import TokenIds

# Numbers of Pillow's filters, by which transformers names them.
PILLOW_FILTERS = {"bilinear": 2, "bicubic": 3}

README = """\
# A vision-language model for transformers 5

Exported from step {step} of a run of Parquetry; data set fingerprint `{fingerprint}`.
Architecture `lfm2_vl`: SigLIP2 NaFlex tower, projector with {merge} x {merge} merge, decoder. Load it with
`AutoModelForImageTextToText`, `AutoTokenizer` and `AutoImageProcessor`. `AutoProcessor` does not fit: the processor
of `lfm2_vl` cuts pictures into tiles, which this model has never seen.

## A picture and a text

{code}

## How its inputs are made

- A picture is resized to h x w patches of {patch} x {patch} pixels, filter {filter}, antialiased, by rule `{resize}`
  of `shared.geometry.resize_grid` (package `parquetry`, needs only numpy and einops): at most {cap} patches, both h
  and w multiples of {merge}. {who_resizes}
- Pixel values are (x / 255 - mean) / std with mean {mean} and std {std}.
- A patch is its pixels row by row, colour fastest. transformers takes patches in raster order; the projector merges
  {merge} x {merge} of them into one image token, so a picture takes h * w / {patches_per_token} tokens `{image}`.
- Tokens of a document: {bos_text}text, and for each picture `{begin_image}`, `{image}` repeated, and `{end_image}`;
  `{eos}` ends the document. These are ids; text itself is encoded without special tokens.
"""

CODE = """\
```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
{imports}
directory = "."  # where this file is
model = AutoModelForImageTextToText.from_pretrained(directory)
tokenizer = AutoTokenizer.from_pretrained(directory)
processor = AutoImageProcessor.from_pretrained(directory)

picture = Image.open("picture.png").convert("RGB")
{resize}pictures = processor(images=[picture], return_tensors="pt")
h, w = pictures["spatial_shapes"][0].tolist()
ids = [{bos}{begin_image}, *[{image}] * (h * w // {patches_per_token}), {end_image}]
ids += tokenizer.encode("A text that begins.", add_special_tokens=False)
output = model.generate(input_ids=torch.tensor([ids]), **pictures, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(output[0, len(ids) :]))
```"""

GEOMETRY_IMPORT = "from shared.geometry import Geometry, resize_grid  # package parquetry\n"
RESIZE = """\
geometry = Geometry(patch_size={patch}, merge={merge}, max_patches_per_image={cap}, resize="{resize}")
[[h, w]] = resize_grid([picture.height], [picture.width], geometry).tolist()
picture = picture.resize((w * {patch}, h * {patch}), Image.Resampling.{filter})
"""


def write_guide(out: Path, dataset: DataSet, step: int) -> None:
    geometry, tokens = dataset.geometry, dataset.tokens
    write_json(
        out / "preprocessor_config.json",
        {
            "image_processor_type": "Siglip2ImageProcessor",
            "do_resize": transformers_resizes(geometry),
            "resample": PILLOW_FILTERS[geometry.filter],
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(geometry.mean),
            "image_std": list(geometry.std),
            "patch_size": geometry.patch_size,
            "max_num_patches": geometry.max_patches_per_image,
        },
    )
    (out / "README.md").write_text(
        describe_inputs(geometry, tokens, dataset.fingerprint, step), encoding="utf-8"
    )


def transformers_resizes(geometry: Geometry) -> bool:
    """Whether its processor for SigLIP2 gives a picture the size that training gave it."""
    return geometry.resize == "fill" and geometry.merge == 1


def describe_inputs(geometry: Geometry, tokens: TokenIds, fingerprint: str, step: int) -> str:
    """README.md of an export."""
    words = {
        "patch": geometry.patch_size,
        "merge": geometry.merge,
        "cap": geometry.max_patches_per_image,
        "patches_per_token": geometry.patches_per_token,
        "image": tokens.image,
        "begin_image": tokens.begin_image,
        "end_image": tokens.end_image,
    }
    alone = transformers_resizes(geometry)
    resize = RESIZE.format(resize=geometry.resize, filter=geometry.filter.upper(), **words)
    code = CODE.format(
        imports="" if alone else GEOMETRY_IMPORT,
        resize="" if alone else resize,
        bos="" if tokens.bos is None else f"{tokens.bos}, ",
        **words,
    )
    return README.format(
        step=step,
        fingerprint=fingerprint[:12],
        code=code,
        filter=geometry.filter,
        resize=geometry.resize,
        who_resizes="The image processor does that."
        if alone
        else "The image processor does not do that, the lines above do.",
        mean=list(geometry.mean),
        std=list(geometry.std),
        bos_text="" if tokens.bos is None else f"`{tokens.bos}`, then ",
        eos=tokens.eos,
        **words,
    )
