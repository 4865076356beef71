/* lanes.h: how an instruction is written: a loop over the 32 lanes, without a test when all are active, so that gcc makes vector
 * code of it. `i` is the lane. Sources and destination may be the same register, lane by lane: ivdep. */
#ifndef EMULATOR_LANES_H
#define EMULATOR_LANES_H

#include "ptx.h"

#define EXEC(name) static void name(struct warp *warp, const struct op *op, uint32_t mask)
#define REG(operand, type) ((type *)lane_reg(warp, op->r[operand]))
#define EACH(statement)                                                                                                \
    do {                                                                                                               \
        if (mask == FULL) {                                                                                            \
            _Pragma("GCC ivdep") for (int i = 0; i < LANES; ++i)                                                       \
            {                                                                                                          \
                statement;                                                                                             \
            }                                                                                                          \
        } else {                                                                                                       \
            for (int i = 0; i < LANES; ++i)                                                                            \
                if (mask >> i & 1) {                                                                                   \
                    statement;                                                                                         \
                }                                                                                                      \
        }                                                                                                              \
    } while (0)

/* d = f(a), f(a, b), f(a, b, c), where the expression sees x, y, z of type T kept in registers of type R. */
#define UNARY(name, R, T, expression)                                                                                  \
    EXEC(name)                                                                                                         \
    {                                                                                                                  \
        R *d = REG(0, R);                                                                                              \
        const R *a = REG(1, R);                                                                                        \
        EACH(const T x = (T)a[i]; d[i] = (R)(expression));                                                             \
    }
#define BINARY(name, R, T, expression)                                                                                 \
    EXEC(name)                                                                                                         \
    {                                                                                                                  \
        R *d = REG(0, R);                                                                                              \
        const R *a = REG(1, R), *b = REG(2, R);                                                                        \
        EACH(const T x = (T)a[i]; const T y = (T)b[i]; d[i] = (R)(expression));                                        \
    }
#define TERNARY(name, R, T, expression)                                                                                \
    EXEC(name)                                                                                                         \
    {                                                                                                                  \
        R *d = REG(0, R);                                                                                              \
        const R *a = REG(1, R), *b = REG(2, R), *c = REG(3, R);                                                        \
        EACH(const T x = (T)a[i]; const T y = (T)b[i]; const T z = (T)c[i]; d[i] = (R)(expression));                   \
    }

#endif
