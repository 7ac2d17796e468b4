"""The trainer of `hive-tiny`, the small chat model that ships with Hive.

Nothing here is needed to run Hive. `phrases` and `corpus` write the conversations, `samples` turns
them into batches, `tokenizer` and `model` say what is trained, `train` trains it, `gguf_file`
writes and reads the shipped file, `engine` asks it through llama.cpp, `evaluate` counts its right
answers, `golden` writes the greedy answers that test every engine, and `safetensors` makes a
Hugging Face folder of the same weights.
"""
