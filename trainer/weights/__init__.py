"""Weights from and for the Hugging Face ecosystem.

    DIRECTORY/config.json + *.safetensors  --settings: same model?--  --names-->  load  -->  parameters of this rank
    RUN/checkpoints/step_*                 --names, settings-->       export            -->  lfm2_vl directory
                                                                      check             -->  its logits against ours

names      what Hugging Face calls our parameters, and which of its own we do not have
settings   config.json against our config, and ours written as one
hub        safetensors files, read by slices
load       a part of the model from a directory, each rank its own slices
start      `python -m trainer import`: a run that begins from such weights
export     `python -m trainer export`: the newest checkpoint as a directory that transformers loads
guide      the README.md inside an export: how its pictures and tokens are made
check      the export's logits against ours, on documents of the data set
"""
