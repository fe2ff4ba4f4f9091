"""Policies inside vLLM (https://github.com/vllm-project/vllm), out of tree. Experimental: it has not run on a GPU.

    dop-compile vllm ./my-model --policy 28%=p.json --out served
    vllm serve served

vLLM finds the plugin by the entry point `vllm.general_plugins`. Written directories name their architecture with the
prefix `Dop`, so that nothing changes for other models. vLLM is imported only where it runs; what writes and checks
directories (`served`, `section`, `policies`, `roles`, `families`) needs none.

    a step's metadata -> runs (who is visual) -> sequences per layer -> narrowed metadata -> decoder without those rows
"""
