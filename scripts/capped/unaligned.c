/* Memory for torch's tensors at multiples of 16 bytes instead of 64, and not always the same ones.
 *
 * torch allocates at multiples of 64, but weights that are mapped from a file, and parts of a larger tensor, lie where
 * they lie. MKL's fp32 matmuls may differ in the last bit between two such places, so a test of equality must compare
 * what lies in one place, or allow for it. Preloaded by run.py (LD_PRELOAD).
 */
#include <errno.h>
#include <malloc.h>
#include <stdlib.h>

int posix_memalign(void **out, size_t alignment, size_t size) {
    static _Thread_local unsigned long state = 88172645463325252UL;
    void *memory;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    if (alignment == 64)
        memory = malloc(size + (state & 0x1f0));
    else
        memory = memalign(alignment, size);
    if (memory == NULL)
        return ENOMEM;
    *out = memory;
    return 0;
}
