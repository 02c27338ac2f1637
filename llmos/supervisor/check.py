"""What can be said about a configuration without starting anything: do the models' directories look like models?"""

from __future__ import annotations

from pathlib import Path

from llmos.config import Config, ModelConfig, model_path
from llmos.errors import ModelError


def check_models(config: Config) -> list[str]:
    """One line per model; raises `ModelError` with one line per problem. The executor later looks inside the files."""
    problems = [problem for model in config.models if (problem := _problem(model, model_path(model))) is not None]
    if problems:
        raise ModelError("\n".join(problems), field="models.path")
    return [f"model {model.name}: {model_path(model)}" for model in config.models]


def _problem(model: ModelConfig, path: Path) -> str | None:
    if model.backend == "fake" and not model.path:
        return None
    if not path.is_dir():
        return f"model {model.name}: no directory {path}"
    if model.backend == "fake":
        return None
    if not (path / "config.json").is_file():
        return f"model {model.name}: {path} has no config.json"
    if not any(path.glob("*.safetensors")):
        return f"model {model.name}: {path} has no *.safetensors (other formats can carry code)"
    return None
