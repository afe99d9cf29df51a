/* The one symbol that an exported kernel would otherwise take from the DSL's 43 MB runtime library:
 * it turns a CUDA error of a launch into a Python exception. */
#include <stdio.h>

extern void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message);

void CuteDSLRT_TVMFFISetRaisedCudaError(void *context, int code) {
  char message[96];
  (void)context;
  snprintf(message, sizeof message, "CUDA error %d at a kernel launch", code);
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", message);
}
