/* What a compiled program is: constant tables that the exporter writes, read by plan.c and execute.c. */
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef void (*kg_kernel)(void *const *buffers, const int64_t *sizes, int64_t begin, int64_t end, void *scratch);

enum { KG_BUFFER_INPUT, KG_BUFFER_PARAM, KG_BUFFER_CONSTANT, KG_BUFFER_TEMPORARY, KG_BUFFER_DIM };
enum { KG_OP_CONSTANT, KG_OP_SYMBOL, KG_OP_ADD, KG_OP_MULTIPLY, KG_OP_FLOOR_DIVIDE, KG_OP_END };
enum { KG_ALIGNMENT = 64, KG_MAX_SYMBOLS = 16, KG_LINE = 64 };

/* A dense tensor. shape: first of `rank` entries in `shapes`; offset: an expression; number: of the input or param, or
   the expression of a dim; data: offset of a constant in the weights; alias: the buffer that this one lies in, or -1. */
typedef struct {
    uint8_t kind, dtype, itemsize, rank;
    int32_t shape, alias, offset, number;
    int64_t data;
} kg_buffer;

/* A kernel launch. operands, sizes, inplace: first entries in the pools of these names. grain: so many units in a row
   share what the first one of a chunk makes; 0 as 1. extent, scratch, flops, bytes: expressions. */
typedef struct {
    kg_kernel kernel;
    int32_t operands, num_operands, num_outputs, sizes, num_sizes, inplace, num_inplace, grain;
    int32_t extent, scratch, flops, bytes;
} kg_step;

/* symbol = (size of an input's axis - shift) / factor */
typedef struct {
    int32_t symbol, input, axis;
    int64_t factor, shift;
} kg_solver;

typedef struct {
    int32_t num_symbols, num_solvers, num_buffers, num_steps, num_operands, num_sizes;
    int32_t num_inputs, num_outputs, num_params, num_donations;
    const kg_solver *solvers;
    const kg_buffer *buffers;
    const kg_step *steps;
    const int32_t *inputs, *outputs, *donations; /* donations: pairs (input, output) */
    const int64_t *params;                       /* offsets of the params in the weights */
    const int32_t *expressions;                  /* where each expression begins in `code` */
    const int64_t *code;
    const int32_t *shapes, *operands, *sizes, *inplace; /* pools */
} kg_program;

static int64_t kg_evaluate(const kg_program *program, int32_t expression, const int64_t *symbols)
{
    int64_t stack[32];
    int top = 0;
    const int64_t *code = program->code + program->expressions[expression];
    for (;;) {
        switch (*code++) {
        case KG_OP_CONSTANT:
            stack[top++] = *code++;
            break;
        case KG_OP_SYMBOL:
            stack[top++] = symbols[*code++];
            break;
        case KG_OP_ADD:
            top--;
            stack[top - 1] += stack[top];
            break;
        case KG_OP_MULTIPLY:
            top--;
            stack[top - 1] *= stack[top];
            break;
        case KG_OP_FLOOR_DIVIDE: {
            int64_t divisor = *code++, value = stack[top - 1];
            stack[top - 1] = value / divisor - (value % divisor < 0);
            break;
        }
        default:
            return stack[0];
        }
    }
}
