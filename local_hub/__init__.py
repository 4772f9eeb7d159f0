"""A small Hugging Face Hub on this machine, for the unmodified `huggingface_hub` client.

    with Hub(root) as hub:          # HF_ENDPOINT must be set before huggingface_hub is imported
        os.environ["HF_ENDPOINT"] = hub.endpoint

From a shell: `python -m local_hub --root DIR [--port N] [--xet]`, from the root of the repository.
"""

from .server import DEFAULT_TOKEN, DEFAULT_USER, Fault, FaultHook, Hub, Record

__all__ = ["DEFAULT_TOKEN", "DEFAULT_USER", "Fault", "FaultHook", "Hub", "Record"]
