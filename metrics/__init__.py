"""The paper's metrics and the networks that some of them look through."""
