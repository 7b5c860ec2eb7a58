"""The operator inside exported programs: the op libraries that runtimes load, and helpers to export with them.

`torch_library` anydelta_torch on libtorch's stable ABI: eager calls, and programs without Python.
`aoti` AOTInductor packages that call it directly.
`qwen3_5` a Qwen3.5 text model that can be exported whole.
"""
