"""Classes of Hugging Face's image-text-to-text mapping that the suite has no model of, and why."""

from __future__ import annotations

__all__ = ["ELSEWHERE"]

_CROSS = "its language model reads images by cross-attention: no visual tokens in the sequence"
_ENCODER_DECODER = "an encoder and a decoder"

ELSEWHERE = {
    "BlipForConditionalGeneration": _CROSS,
    "EvollaForProteinText2Text": _CROSS,
    "IdeficsForVisionText2Text": _CROSS,
    "Florence2ForConditionalGeneration": _ENCODER_DECODER,
    "Pix2StructForConditionalGeneration": _ENCODER_DECODER,
    "PPFormulaNetForConditionalGeneration": _ENCODER_DECODER,
    "T5Gemma2ForConditionalGeneration": _ENCODER_DECODER,
    "UdopForConditionalGeneration": _ENCODER_DECODER,
    "VisionEncoderDecoderModel": _ENCODER_DECODER,
    "DiffusionGemmaForBlockDiffusion": "it does not generate from left to right, but blocks of tokens by denoising",
    "PI0ForConditionalGeneration": "it generates a robot's actions, not tokens",
    "Gemma3nForConditionalGeneration": "its tower needs timm; its decoder is Gemma3nForCausalLM's, which is refused",
    "NemotronH_Omni_Reasoning_V3": "its decoder is NemotronHForCausalLM's, which is refused",
}
