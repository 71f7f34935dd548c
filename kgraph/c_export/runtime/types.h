#ifndef KGRAPH_TYPES
#define KGRAPH_TYPES
#include <stddef.h>
#include <stdint.h>

/* What functions return. No function prints, exits or raises a signal. */
typedef enum kg_status {
    KG_OK = 0,
    KG_INVALID_ARGUMENT = 1, /* a null pointer, or a number out of range */
    KG_WRONG_SHAPE = 2,      /* the model takes no inputs of these shapes */
    KG_TOO_SMALL = 3,        /* the given memory is smaller than asked for */
    KG_UNSUPPORTED_CPU = 4,  /* the library has no code that this processor can run */
    KG_NO_WEIGHTS = 5,       /* weights lie in a file that has not been opened */
    KG_WRONG_WEIGHTS = 6,    /* the file holds no weights, or those of another model */
    KG_IO = 7,               /* a file cannot be read or written; errno says why */
    KG_SYSTEM = 8            /* the system refused a thread or a lock */
} kg_status;

typedef enum kg_dtype {
    KG_BOOL, KG_INT8, KG_INT16, KG_INT32, KG_INT64, KG_UINT8, KG_UINT16, KG_UINT32, KG_UINT64,
    KG_FLOAT16, KG_BFLOAT16, KG_FLOAT32, KG_FLOAT64, KG_OTHER_DTYPE
} kg_dtype;

/* One input, output or state tensor: dense, in row-major order. */
typedef struct kg_tensor_info {
    const char *name;
    kg_dtype dtype;
    int rank;
    const int64_t *shape; /* -1 for a size that differs from call to call */
} kg_tensor_info;

typedef struct kg_plan kg_plan; /* the model prepared for inputs of certain shapes; read-only, shared by threads */
typedef struct kg_pool kg_pool; /* threads that take part in calls */
#endif
