/* Calls of a kernel that look like one made before, without Python between its arguments and the kernel's.
 *
 * `record_call` notes how the tensors of a call are laid out and what the kernel got for them. The function that it
 * returns compares the tensors of a later call with that and, if they look the same, hands the kernel the same
 * arguments at the new addresses. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

enum { MAX_ARGUMENTS = 40, MAX_DIMS = 5, CONSTANT = -1, WORKSPACE = -2 };

typedef struct {
  int64_t shape[MAX_DIMS], strides[MAX_DIMS];
  DLTensor tensor;
} Layout;

typedef struct {
  TVMFFIAny value; /* of a call's argument only the type index; a constant's reference is held */
  Layout layout;   /* if it is a tensor */
  int32_t source;  /* of a kernel's argument: which of the call's it follows, CONSTANT or WORKSPACE */
} Argument;

typedef struct {
  TVMFFIObjectHandle kernel;
  int32_t num_inputs, num_arguments;
  Argument inputs[MAX_ARGUMENTS], arguments[MAX_ARGUMENTS];
} RecordedCall;

static int refuse(const char *message) {
  TVMFFIErrorSetRaisedFromCStr("ValueError", message);
  return -1;
}

static const DLTensor *tensor_of(const TVMFFIAny *value) {
  if (value->type_index == kTVMFFITensor) return (const DLTensor *)(value->v_obj + 1); /* follows the header */
  return value->type_index == kTVMFFIDLTensorPtr ? (const DLTensor *)value->v_ptr : NULL;
}

/* Rows of bytes or 16-bit elements are read by TMA and wide copies, which need multiples of 16 bytes. */
static int is_aligned(const DLTensor *tensor) {
  return tensor->dtype.bits >= 32 || (uintptr_t)tensor->data % 16 == 0;
}

static int note(const TVMFFIAny *value, Argument *argument) {
  const DLTensor *tensor = tensor_of(value);
  argument->value = *value;
  if (!tensor) return 0;
  if (tensor->ndim > MAX_DIMS || !tensor->strides || tensor->byte_offset)
    return refuse("record_call: got a tensor of more dimensions than are recorded, without strides or with an offset");
  Layout *layout = &argument->layout;
  layout->tensor = *tensor;
  memcpy(layout->shape, tensor->shape, tensor->ndim * sizeof(int64_t));
  memcpy(layout->strides, tensor->strides, tensor->ndim * sizeof(int64_t));
  layout->tensor.shape = layout->shape;
  layout->tensor.strides = layout->strides;
  return 0;
}

static int looks_like(const TVMFFIAny *value, const Argument *recorded) {
  const DLTensor *tensor = tensor_of(value), *before = &recorded->layout.tensor;
  if (value->type_index != recorded->value.type_index) return 0;
  if (!tensor) return 1;
  size_t bytes = tensor->ndim * sizeof(int64_t);
  return tensor->ndim == before->ndim && !memcmp(&tensor->dtype, &before->dtype, sizeof(DLDataType)) &&
         !memcmp(&tensor->device, &before->device, sizeof(DLDevice)) && tensor->strides && !tensor->byte_offset &&
         !memcmp(tensor->shape, before->shape, bytes) && !memcmp(tensor->strides, before->strides, bytes) &&
         is_aligned(tensor);
}

/* (the call's arguments) -> whether they look as recorded and the kernel was launched. */
static int replay(void *self, const TVMFFIAny *inputs, int32_t num_inputs, TVMFFIAny *result) {
  const RecordedCall *call = self;
  result->type_index = kTVMFFIBool;
  result->zero_padding = 0;
  result->v_int64 = 0;
  if (num_inputs != call->num_inputs) return 0;
  for (int32_t i = 0; i < num_inputs; i++)
    if (!looks_like(&inputs[i], &call->inputs[i])) return 0;

  TVMFFIAny values[MAX_ARGUMENTS], none = {.type_index = kTVMFFINone};
  DLTensor tensors[MAX_ARGUMENTS];
  TVMFFIObjectHandle workspace = NULL;
  for (int32_t i = 0; i < call->num_arguments; i++) {
    const Argument *argument = &call->arguments[i];
    values[i] = argument->value;
    if (argument->source == CONSTANT) continue;
    tensors[i] = argument->layout.tensor;
    if (argument->source == WORKSPACE) {
      if (TVMFFIEnvTensorAlloc(&tensors[i], &workspace)) return -1;
      values[i].type_index = kTVMFFITensor;
      values[i].v_ptr = workspace;
      continue;
    }
    const DLTensor *tensor = tensor_of(&inputs[argument->source]);
    if (!tensor) {
      values[i] = inputs[argument->source];
      continue;
    }
    tensors[i].data = tensor->data;
    values[i].type_index = kTVMFFIDLTensorPtr;
    values[i].v_ptr = &tensors[i];
  }
  int error = TVMFFIFunctionCall(call->kernel, values, call->num_arguments, &none);
  if (workspace) TVMFFIObjectDecRef(workspace); /* whoever gets its memory next is behind the kernel in the stream */
  result->v_int64 = !error;
  return error;
}

static void forget(void *self) {
  RecordedCall *call = self;
  for (int32_t i = 0; i < call->num_arguments; i++) {
    const Argument *argument = &call->arguments[i];
    if (argument->source == CONSTANT && argument->value.type_index >= kTVMFFIStaticObjectBegin)
      TVMFFIObjectDecRef(argument->value.v_obj);
  }
  TVMFFIObjectDecRef(call->kernel);
  free(call);
}

/* (kernel, n, the n arguments of the call, for each argument of the kernel: its source, itself) -> replay. */
int __tvm_ffi_record_call(void *self, const TVMFFIAny *args, int32_t num_args, TVMFFIAny *result) {
  (void)self;
  int32_t num_inputs = (int32_t)args[1].v_int64, num_arguments = (num_args - 2 - num_inputs) / 2;
  if (num_inputs > MAX_ARGUMENTS || num_arguments > MAX_ARGUMENTS)
    return refuse("record_call: got more arguments than are recorded");
  RecordedCall *call = calloc(1, sizeof *call);
  if (!call) return refuse("record_call: out of memory");
  call->kernel = args[0].v_obj;
  TVMFFIObjectIncRef(call->kernel);
  call->num_inputs = num_inputs;
  int error = 0;
  TVMFFIObjectHandle workspace;
  const TVMFFIAny *inputs = args + 2, *rest = inputs + num_inputs;
  for (int32_t i = 0; i < num_inputs && !error; i++) error = note(&inputs[i], &call->inputs[i]);
  for (int32_t i = 0; i < num_arguments && !error; i++) {
    const TVMFFIAny *value = &rest[2 * i + 1];
    Argument *argument = &call->arguments[i];
    error = note(value, argument);
    argument->source = (int32_t)rest[2 * i].v_int64;
    call->num_arguments = i + 1;
    if (argument->source == CONSTANT && value->type_index >= kTVMFFIStaticObjectBegin) TVMFFIObjectIncRef(value->v_obj);
    if (argument->source == WORKSPACE && !error && !(error = TVMFFIEnvTensorAlloc(&argument->layout.tensor, &workspace)))
      TVMFFIObjectDecRef(workspace); /* it can be allocated */
  }
  TVMFFIObjectHandle function;
  if (error || (error = TVMFFIFunctionCreate(call, replay, forget, &function))) {
    forget(call);
    return error;
  }
  result->type_index = kTVMFFIFunction;
  result->zero_padding = 0;
  result->v_obj = function;
  return 0;
}
