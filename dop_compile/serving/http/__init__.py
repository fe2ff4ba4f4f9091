"""An OpenAI-compatible server over an engine of `dop_compile.serving`: FastAPI and uvicorn."""
