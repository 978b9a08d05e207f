"""How figures reach people and tools: TensorBoard scalars, the console."""
