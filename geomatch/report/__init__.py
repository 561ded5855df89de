"""Output for people: contact sheets, the HTML report, TensorBoard and projections."""
