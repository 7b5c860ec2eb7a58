"""The operator inside exported programs: the op libraries that runtimes load, and helpers to export with them.

`torch_library` anydelta_torch on libtorch's stable ABI: eager calls, and programs without Python.
`aoti` AOTInductor packages that call it directly.
`executorch` ExecuTorch programs, and the kernels for its runtime.
`onnx` ONNX programs, and the kernel for ONNX Runtime.
`peers` a graph pass: ExecuTorch's own gated delta rules become anydelta's.
`qwen3_5` a Qwen3.5 text model that can be exported whole.
"""
