"""How an encoder is fine-tuned."""

import math
from dataclasses import dataclass

from fedssl.errors import ConfigError

_CHOICES = {"part": ("head", "last", "all"), "precision": ("float32", "bf16", "auto")}
_COUNTS = ("least_steps", "most_steps", "batch_size", "checks", "patience")


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune; a ConfigError names every value that is impossible."""

    part: str = "all"  # what is trained: head, last (head and the encoder's last stage), all
    lr: float = 5e-4  # of the encoder (AdamW)
    head_lr: float = 5e-3
    weight_decay: float = 0.05  # of weights, not of biases and norms
    epochs: float = 15.0  # passes over the labelled images
    least_steps: int = 100
    most_steps: int = 1000
    batch_size: int = 32  # lowered to the images there are
    checks: int = 15  # looks at the validation patients, beside one before the first step
    patience: int = 5  # looks in a row without a better one that end the training
    validation: float = 0.2  # share of the labelled patients that decide when to stop
    precision: str = "float32"  # float32, bf16, auto (bf16 on a GPU)

    def __post_init__(self) -> None:
        """Refuse what is no recipe."""
        given = {name: x if type(x) in (int, float) else math.nan for name, x in vars(self).items()}
        wrong = {name: f"one of {', '.join(of)}" for name, of in _CHOICES.items() if getattr(self, name) not in of}
        wrong |= {x: "a whole number above 0" for x in _COUNTS if type(given[x]) is not int or given[x] < 1}
        for name, most in (("lr", math.inf), ("head_lr", math.inf), ("epochs", math.inf), ("validation", 1)):
            wrong |= {} if 0 < given[name] < most else {name: f"a number above 0 and below {most}"}
        wrong |= {} if 0 <= given["weight_decay"] < math.inf else {"weight_decay": "a number of at least 0"}
        wrong |= {"least_steps": "at most most_steps"} if given["least_steps"] > given["most_steps"] else {}
        if wrong:
            texts = [f"finetune.{name}={getattr(self, name)} must be {must}" for name, must in wrong.items()]
            raise ConfigError("; ".join(texts) + ".")

    def steps(self, images: int) -> int:
        """Plan the steps for that many training images."""
        return min(max(round(self.epochs * images / min(self.batch_size, images)), self.least_steps), self.most_steps)
