"""What the toy world has words for. Imports nothing heavy: a prompt is checked before anything is loaded."""

NAMES = (
    "duck",
    "car",
    "chair",
    "rocket",
    "burger",
    "icecream",
    "castle",
    "house",
    "snowman",
    "mushroom",
    "boat",
    "pig",
)

COLORS = {
    "red": (0.85, 0.10, 0.10),
    "yellow": (0.95, 0.80, 0.10),
    "green": (0.10, 0.60, 0.15),
    "cyan": (0.15, 0.80, 0.85),
    "blue": (0.12, 0.20, 0.85),
    "purple": (0.60, 0.12, 0.70),
}

UNSEEN_PAIRS = (
    ("blue", "duck"),
    ("green", "car"),
    ("purple", "chair"),
    ("yellow", "rocket"),
    ("red", "castle"),
    ("cyan", "mushroom"),
    ("blue", "snowman"),
    ("green", "pig"),
)  # never in training data: they show that colour and object compose

DEGRADATIONS = ("blurry", "faded", "foggy")  # words of bad pictures, which `render.degraded` makes
