"""Models for LMMS_EVAL_PLUGINS=dop_compile.plugins.lmms_eval.

lmms-eval has this beside entry points, and calls it deprecated. It knows simple models only; the entry point gives the
chat model as well.
"""

AVAILABLE_MODELS = {"dop_compile": "SimpleDopCompile"}
