"""The restoration study on a pre-trained model: both stages, equal budgets, benchmarks."""
