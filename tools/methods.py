"""Average and compare the results of benchmarks/sparsity_methods.py over the seeds.

A row of the results: {"method": "proximal", "loss-LAMBDA", "magnitude", "one-shot" or "dense" (target 0), "target":
share of zeros, "seed", "accuracy": on the hold-out, ...}.
"""
import statistics


def kind_of(method: str) -> str:
    """Return the method without its lambda."""
    return "loss" if method.startswith("loss-") else method


def by_lambda(method: str) -> tuple[str, float]:
    """Return what methods are sorted by: the name, and then the lambda of loss-LAMBDA."""
    kind = kind_of(method)
    return kind, float(method.removeprefix("loss-")) if kind != method else 0.0


def by_seed(rows: list[dict]) -> dict[float, dict[str, dict[int, float]]]:
    """Return {target: {method: {seed: accuracy}}} of the comparison's rows, sorted."""
    values = {}
    for row in sorted(rows, key=lambda row: (row["target"], *by_lambda(row["method"]), row["seed"])):
        values.setdefault(row["target"], {}).setdefault(row["method"], {})[row["seed"]] = row["accuracy"]
    return values


def mean_of(values: dict[int, float]) -> str:
    """Return the text of accuracies by seed: mean ± standard deviation (seeds); one seed has no deviation."""
    found = list(values.values())
    spread = f" ± {statistics.stdev(found):.2%}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.2%}{spread} ({len(found)})"


def differences(values: dict[int, float], others: dict[int, float]) -> str:
    """Return the text of what accuracies are above others, in points, for each seed that both have."""
    return ", ".join(f"{100 * (values[seed] - others[seed]):+.2f}" for seed in values if seed in others)
