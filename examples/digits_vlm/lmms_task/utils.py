"""What the tasks ask of a document, and how its answer is judged."""

from typing import Any

from transformers.image_utils import load_image

OPTIONS = {"yesno": ["yes", "no"], "choice": ["a", "b", "c", "d"]}


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    return [load_image(doc["image"])]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    return str(doc["question"])


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    right = float(results[0].strip() == doc["answer"])
    return {"accuracy": right, doc["kind"]: right}


def with_options(documents: Any) -> Any:
    return documents.filter(lambda doc: doc["kind"] in OPTIONS)


def doc_to_choice(doc: dict[str, Any]) -> list[str]:
    return OPTIONS[doc["kind"]]


def doc_to_number(doc: dict[str, Any]) -> int:
    return OPTIONS[doc["kind"]].index(doc["answer"])
