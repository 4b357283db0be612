"""Stage 2: train a vision-language model from a finished data set. `python -m trainer train CONFIG`.

    train       the run: resume, loop, checkpoints, evaluation     run         its directory
    data/       order of data, batches from mapped packs           step        one optimizer step
    models/     encoder, projector, decoder, their composition     loss        cross-entropy without logits
    parallel/   processes and layouts, from outside the model      attention   masks and backends
    weights/    Hugging Face weights in and out                    optim       what is trained, AdamW, schedules
    gradients   norms over any layout, clipping                    guard       steps that are skipped
    evaluate    validation loss and vision gain                    checkpoint  complete or absent
    metrics     rows; console and trackers show them               describe    the arithmetic at the start
    flops       of useful tokens and patches; MFU                  memory      what a rank takes, by formula
    plan        a layout without a device                          profile     traces of chosen steps
    shards      what a rank holds of a parameter
    signals     a run that is asked to stop, and exit codes        config      the TOML file

Imports torch and `shared`; never ray, a tokenizer, or the other stage.
"""
