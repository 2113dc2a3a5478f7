"""Average the results of benchmarks/sparsity_methods.py over the seeds.

A row of the results: {"method": "proximal", "loss-LAMBDA", "magnitude" or "one-shot", "target": share of zeros, "seed",
"accuracy": on the hold-out, ...}.
"""
import statistics


def by_lambda(method: str) -> tuple[str, float]:
    """Return what methods are sorted by: the name, and then the lambda of loss-LAMBDA."""
    name, _, rest = method.partition("-")
    return name, float(rest) if name == "loss" and rest else 0.0


def means(rows: list[dict]) -> dict[float, dict[str, tuple[float, float, int]]]:
    """Return {target: {method: (mean accuracy, standard deviation over the seeds, seeds)}} of the comparison's rows."""
    values = {}
    for row in sorted(rows, key=lambda row: (row["target"], *by_lambda(row["method"]))):
        values.setdefault(row["target"], {}).setdefault(row["method"], []).append(row["accuracy"])
    return {target: {method: (statistics.mean(each), statistics.stdev(each) if len(each) > 1 else 0.0, len(each))
                     for method, each in found.items()} for target, found in values.items()}


def of_seeds(mean: float, deviation: float, seeds: int) -> str:
    """Return the text of an accuracy; one seed has no deviation."""
    return f"{mean:.2%} ± {deviation:.2%} ({seeds})" if seeds > 1 else f"{mean:.2%} (1)"


def is_finished(rows: list[dict]) -> bool:
    """Return whether every method has three seeds at every target; of the penalty in the loss, one lambda has."""
    return all(max(seeds for method, (*_, seeds) in found.items() if method.startswith(kind)) >= 3
               for found in means(rows).values() for kind in {method.partition("-")[0] for method in found})
