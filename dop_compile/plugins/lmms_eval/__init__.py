"""Compiled models in lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), which brings the benchmarks.

    lmms-eval --model dop_compile --model_args pretrained=llava-hf/llava-1.5-7b-hf,policy=p.json --tasks gqa

lmms-eval finds the model by the entry point `lmms_eval.models`. It is imported by the modules in here only, so that
nothing else of the project needs it.
"""
