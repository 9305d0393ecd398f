"""What a task's labels give away to a rule that knows no language. Accuracy on the dev items, as JSON.

    python benchmarks/fidelity/baselines.py recipes/fidelity/{mnli,qnli,sst2}.toml > benchmarks/fidelity/baselines.json

Each rule learns from the recipe's own training examples:

    majority        the label that is commonest on the dev items
    words           multinomial naive Bayes, add-one smoothed, over the lower-cased words of all texts of an item
    words of TEXT   the same over one text of a pair, such as the hypothesis alone, which cannot tell how the two relate
    overlap         the commonest label of training pairs with this share, in tenths, of its shorter text's words shared
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bitdistill.data import glue
from bitdistill.data.tasks import Example, Task, load_task
from bitdistill.recipe import load_recipe

Features = Callable[[Example], Sequence[object]]


def words(*texts: str) -> list[str]:
    """Lower-cased words."""
    return re.findall(r"\w+", " ".join(texts).lower())


def overlap(example: Example) -> list[int]:
    """Share of the shorter text's different words that the other has, in tenths, rounded."""
    few, many = sorted((set(words(text)) for text in example.segments), key=len)
    return [round(10 * len(few & many) / max(1, len(few)))]


def naive_bayes(task: Task, features: Features) -> float:
    """Accuracy of ``argmax_c log p(c) + sum_f log p(f | c)``, p(f | c) = (n_fc + 1) / (n_c + number of features)."""
    counts = [Counter[object]() for _ in task.labels]
    for example in task.train:
        counts[example.label or 0].update(features(example))
    known = set().union(*counts)
    index = {feature: i for i, feature in enumerate(known)}
    table = np.array([[count[feature] + 1 for feature in index] for count in counts], dtype=np.float64)
    log_likelihood = np.log(table / table.sum(axis=1, keepdims=True))
    prior = np.log([sum(e.label == label for e in task.train) for label in range(len(task.labels))])
    correct = 0
    for example in task.test:
        chosen = [index[feature] for feature in features(example) if feature in index]
        correct += int((prior + log_likelihood[:, chosen].sum(axis=1)).argmax() == example.label)
    return correct / len(task.test)


def baselines(task: Task, columns: Sequence[str]) -> dict[str, float]:
    """Accuracy of every rule by its name."""
    found = {
        "majority": task.majority_accuracy() or 0.0,
        "words": naive_bayes(task, lambda e: words(*e.segments)),
    }
    if len(columns) > 1:
        for i, column in enumerate(columns):
            found[f"words of {column}"] = naive_bayes(task, lambda e, i=i: words(e.segments[i]))  # type: ignore[misc]
        found["overlap"] = naive_bayes(task, overlap)
    return found


COLUMNS = {"sst2": glue.SST2.columns, "qnli": glue.QNLI.columns, "mnli": glue.MNLI.columns}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", type=Path, nargs="+")
    configs = [load_recipe(path).task for path in parser.parse_args().recipes]
    results = {config.name: baselines(load_task(config), COLUMNS[config.name]) for config in configs}
    print(json.dumps(results, indent=1))
