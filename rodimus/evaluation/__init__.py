"""How good a model is: held-out loss by document, and the tasks of lm-evaluation-harness."""
