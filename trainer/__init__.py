"""Stage 2: train a vision-language model from a finished data set. `python -m trainer train CONFIG`.

    train       the run: resume, loop, checkpoints, evaluation     run         its directory
    data/       order of data, batches from mapped packs           step        one optimizer step
    models/     encoder, projector, decoder, their composition     loss        cross-entropy without logits
    parallel/   processes and sharding, from outside the model     attention   masks and backends
    optim       AdamW, schedule, clipping                          checkpoint  complete or absent
    evaluate    validation loss and vision gain                    metrics     console, JSONL, TensorBoard
    signals     a run that is asked to stop, and exit codes

Imports torch and `shared`; never ray, a tokenizer, or the other stage.
"""
