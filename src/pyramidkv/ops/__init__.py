"""The tensor operations: one folder or file an operation, its plain torch definition first."""
