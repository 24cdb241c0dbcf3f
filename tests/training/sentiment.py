"""Sentiment lines for the demo's head and verbalizer: generated for training, written one by one for the held-out score.

Every line was written for this project. No held-out line is made of the training lines' parts. Standard library only.
"""

# ruff: noqa: E501  one line is one review

from __future__ import annotations

LABELS = ("negative", "positive")

SUBJECTS = (
    "The movie", "This phone", "The hotel room", "My new laptop", "The soup", "The concert", "Their service", "The book",
    "This camera", "The train ride", "The museum tour", "Our waiter", "The mattress", "The song", "This update", "The garden",
)  # fmt: skip

OPINIONS = {
    "positive": (
        "was a joy from start to finish.", "works perfectly and I love it.", "made me very happy.", "is worth every cent.",
        "was even better than I had hoped.", "is the best I have ever had.", "was wonderful, thank you!", "is simply excellent.",
        "was charming and full of warmth.", "exceeded all my expectations.", "is great value and looks beautiful.",
        "was delightful; I would recommend it to anyone.", "left me smiling all day.", "is reliable, quick and kind to use.",
    ),
    "negative": (
        "was a complete waste of time.", "broke after two days and I hate it.", "made me very angry.", "is not worth the money.",
        "was even worse than I had feared.", "is the worst I have ever had.", "was awful, never again!", "is simply terrible.",
        "was dull and full of mistakes.", "let me down in every way.", "is overpriced and looks cheap.",
        "was disappointing; I would warn anyone about it.", "left me tired and annoyed.", "is slow, noisy and painful to use.",
    ),
}  # fmt: skip

HELD_OUT = (
    ("positive", "I have been using it for a month and could not be more pleased."),
    ("positive", "Our kids laughed the whole evening, and so did we."),
    ("positive", "Fast delivery, friendly people, and the coat fits like a dream."),
    ("positive", "What a lovely little restaurant, we will be back soon."),
    ("positive", "The battery lasts forever and the screen is gorgeous."),
    ("positive", "A brilliant performance that moved the whole audience to tears of joy."),
    ("positive", "They fixed my bike in ten minutes and charged nothing."),
    ("positive", "Finally a vacuum cleaner that does what it promises."),
    ("positive", "Fresh bread, good coffee and a smile every morning."),
    ("positive", "I finished it in one night because I could not put it down."),
    ("positive", "The staff went out of their way to help us."),
    ("positive", "Crisp sound, comfortable fit, ten out of ten."),
    ("positive", "Setting it up was easy and it has run without a hitch."),
    ("positive", "My grandmother adores her new radio."),
    ("positive", "An inspiring talk by a speaker who clearly loves her subject."),
    ("positive", "The view from the balcony took my breath away."),
    ("negative", "I want my money back."),
    ("negative", "The zipper tore on the first morning and nobody answers my mails."),
    ("negative", "We waited two hours and the food arrived cold."),
    ("negative", "Half of the pages were missing and the cover was torn."),
    ("negative", "It crashes every time I open a file."),
    ("negative", "The room smelled of smoke and the sheets were dirty."),
    ("negative", "Rude staff, long queues, and the show was cancelled."),
    ("negative", "My skin itches since I started using this cream."),
    ("negative", "The plot makes no sense and the acting is wooden."),
    ("negative", "Do not buy this, it stops charging after a week."),
    ("negative", "The instructions are useless and two screws were missing."),
    ("negative", "I regret every minute I spent on it."),
    ("negative", "The driver was late and then got lost."),
    ("negative", "It leaks, it rattles, and the handle came off."),
    ("negative", "Nothing works as advertised and support just shrugs."),
    ("negative", "I was bored after ten minutes and left at the break."),
)

#: How many of the held-out lines the demo's two classifiers get right, as train_sentiment.py prints.
HELD_OUT_RIGHT = {"sentiment-head": 30, "sentiment-prompt": 28}


def training_lines() -> list[tuple[str, str]]:
    """(label, line), both labels equally often."""
    return [(label, f"{subject} {opinion}") for label in LABELS for subject in SUBJECTS for opinion in OPINIONS[label]]
