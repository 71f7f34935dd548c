/* A plan: a program prepared for the sizes of one kind of call. Read-only once made; any number of threads may use it. */

enum { KG_SPACE_INPUT, KG_SPACE_PARAM, KG_SPACE_CONSTANT, KG_SPACE_ARENA, KG_SPACE_OUTPUT, KG_SPACE_DIM };

typedef struct {
    int32_t space, index;
    int64_t offset;
} kg_place;

/* A step at concrete sizes. threads: how many own chunks of it; claims: its first claim counter; barrier: the steps
   before must be done first, which are counted by counter `group` up to `group_chunks`. The record after the last step
   ends the last group. */
typedef struct {
    kg_kernel kernel;
    const int64_t *sizes;
    int64_t extent, chunks, grain, group_chunks;
    int32_t operands, threads, claims, barrier, group;
} kg_record;

struct kg_plan {
    const kg_program *program;
    const unsigned char *weights;
    int64_t symbols[KG_MAX_SYMBOLS];
    size_t arena_bytes, scratch_bytes, copies_bytes;
    int32_t threads, num_records, num_claims, num_groups;
    kg_place *places;      /* by buffer */
    int64_t *nbytes;       /* by buffer */
    int64_t *dims;         /* by buffer: the value of a dim, in its dtype */
    int64_t *sizes;        /* the kernels' run-time integers */
    kg_record *records;    /* by step that has work, and one more */
    int32_t *direct;       /* by output: whether it is written straight into its array */
    int32_t *donors;       /* by output: the input in whose array it is written, or -1 */
    int64_t *copies;       /* by output: offset in the workspace of a donated output that has no donor, or -1 */
};
