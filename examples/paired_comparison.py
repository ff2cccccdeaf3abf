"""Every strategy against one reference, on the same seeds, Holm-corrected.

python examples/paired_comparison.py [results] [digits] [finetune]
"""

import sys

from clbench.results import read
from clbench.statistics import against


def main(folder: str = "results", scenario: str = "digits", reference: str = "finetune") -> None:
    runs = read(folder)
    runs = runs[(runs["status"] == "complete") & (runs["split"] == "evaluate")]
    runs = runs[(runs["tuned"] != "trial") & (runs["scenario"] == scenario)]
    # One row a seed, one column a strategy; only seeds that all of them have are pairs.
    scores = runs.pivot_table("average_accuracy", "seed", "strategy", aggfunc="first").dropna()
    others = {name: scores[name] for name in scores if name != reference}
    for name, found in against(scores[reference], others).items():
        verdict = f"p = {found.p_value:.3f}" if found.p_value is not None else found.reason
        print(f"{name:20} {100 * (found.difference or 0):+6.1f} points, {verdict}")


if __name__ == "__main__":
    main(*sys.argv[1:])
