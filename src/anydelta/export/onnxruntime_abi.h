// The part of ONNX Runtime's C interface that a library of custom operators needs. No Python package has its
// headers. The interface is a table of functions, and each release only appends to it. So the few places that are
// used are named here, and the library builds without ONNX Runtime. Source: onnxruntime_c_api.h, struct OrtApi and
// struct OrtCustomOp.
#pragma once
#include <cstddef>
#include <cstdint>

namespace anydelta::ort {

struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Status;  // null: success
struct Value;
struct TensorInfo;

// The release (1.17) whose table has all of these.
constexpr uint32_t VERSION = 17;
constexpr int INVALID_ARGUMENT = 2, FAIL = 1;  // OrtErrorCode

// ONNXTensorElementDataType; OrtCustomOpInputOutputCharacteristic; OrtMemType
constexpr int FLOAT = 1, INT64 = 7, BOOL = 9, FLOAT16 = 10, BFLOAT16 = 16;
constexpr int REQUIRED = 0, OPTIONAL = 1;
constexpr int MEMORY_DEFAULT = 0;

// A function of the table: its place and its type.
template <int PLACE, class... Arguments>
struct Function {
    template <class... Given>
    Status* operator()(const void* const* api, Given... given) const {
        return reinterpret_cast<Status* (*)(Arguments...)>(const_cast<void*>(api[PLACE]))(given...);
    }
};

using Api = const void* const;  // OrtApi, as an array of functions
struct ApiBase {
    Api* (*GetApi)(uint32_t version);  // null: the runtime is older
    const char* (*GetVersionString)();
};

constexpr Function<0, int, const char*> CreateStatus;
constexpr Function<26, const char*, CustomOpDomain**> CreateCustomOpDomain;
constexpr Function<27, CustomOpDomain*, const struct CustomOp*> CustomOpDomain_Add;
constexpr Function<28, SessionOptions*, CustomOpDomain*> AddCustomOpDomain;
constexpr Function<51, Value*, void**> GetTensorMutableData;
constexpr Function<60, const TensorInfo*, int*> GetTensorElementType;
constexpr Function<61, const TensorInfo*, size_t*> GetDimensionsCount;
constexpr Function<62, const TensorInfo*, int64_t*, size_t> GetDimensions;
constexpr Function<65, const Value*, TensorInfo**> GetTensorTypeAndShape;
constexpr Function<85, const KernelInfo*, const char*, float*> KernelInfoGetAttribute_float;
constexpr Function<86, const KernelInfo*, const char*, int64_t*> KernelInfoGetAttribute_int64;
constexpr Function<87, const KernelInfo*, const char*, char*, size_t*> KernelInfoGetAttribute_string;
constexpr Function<88, const KernelContext*, size_t*> KernelContext_GetInputCount;
constexpr Function<89, const KernelContext*, size_t*> KernelContext_GetOutputCount;
constexpr Function<90, const KernelContext*, size_t, const Value**> KernelContext_GetInput;
constexpr Function<91, KernelContext*, size_t, const int64_t*, size_t, Value**> KernelContext_GetOutput;
constexpr Function<274, const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*> KernelContext_ParallelFor;

inline void ReleaseStatus(Api* api, Status* status) {
    reinterpret_cast<void (*)(Status*)>(const_cast<void*>(api[93]))(status);
}
inline void ReleaseTensorInfo(Api* api, TensorInfo* info) {
    reinterpret_cast<void (*)(TensorInfo*)>(const_cast<void*>(api[99]))(info);
}

// OrtCustomOp as of VERSION. The runtime passes the pointer that it was given.
struct CustomOp {
    uint32_t version;
    void* (*CreateKernel)(const CustomOp*, Api*, const KernelInfo*);
    const char* (*GetName)(const CustomOp*);
    const char* (*GetExecutionProviderType)(const CustomOp*);  // null: the CPU
    int (*GetInputType)(const CustomOp*, size_t index);
    size_t (*GetInputTypeCount)(const CustomOp*);
    int (*GetOutputType)(const CustomOp*, size_t index);
    size_t (*GetOutputTypeCount)(const CustomOp*);
    void (*KernelCompute)(void* kernel, KernelContext*);
    void (*KernelDestroy)(void* kernel);
    int (*GetInputCharacteristic)(const CustomOp*, size_t index);
    int (*GetOutputCharacteristic)(const CustomOp*, size_t index);
    int (*GetInputMemoryType)(const CustomOp*, size_t index);
    int (*GetVariadicInputMinArity)(const CustomOp*);
    int (*GetVariadicInputHomogeneity)(const CustomOp*);
    int (*GetVariadicOutputMinArity)(const CustomOp*);
    int (*GetVariadicOutputHomogeneity)(const CustomOp*);
    Status* (*CreateKernelV2)(const CustomOp*, Api*, const KernelInfo*, void** kernel);
    Status* (*KernelComputeV2)(void* kernel, KernelContext*);
    Status* (*InferOutputShape)(const CustomOp*, void* context);
    int (*GetStartVersion)(const CustomOp*);
    int (*GetEndVersion)(const CustomOp*);
};

}  // namespace anydelta::ort
