"""Models for LMMS_EVAL_PLUGINS=dop_compile.lmms_plugin, which lmms-eval has beside entry points and calls deprecated.

It knows simple models only; the entry point gives the chat model as well.
"""

AVAILABLE_MODELS = {"dop_compile": "SimpleDopCompile"}
