/* nf4.h: the 16 values of NormalFloat4, the quantiles of N(0,1) scaled to [-1,1] of "QLoRA: Efficient Finetuning of
 * Quantized LLMs" (arXiv 2305.14314, appendix E), as fp32; and the middles between neighbours, each the largest fp32 number that is
 * not above it: the nearest value of x is the one with the number of middles that x exceeds, halfway the lower. */
#ifndef PLORA_NF4_H
#define PLORA_NF4_H

#define PLORA__NF4_VALUES                                                                                              \
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,                   \
        -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,                \
        0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f,    \
        1.0f

#define PLORA__NF4_MIDDLES                                                                                             \
    -0x1.b239b2p-1f, -0x1.38a4e2p-1f, -0x1.d709p-2f, -0x1.5bd4eep-2f, -0x1.e079dap-3f, -0x1.1a7178p-3f,                \
        -0x1.74f0e2p-5f, 0x1.45f5fep-5f, 0x1.ec90c4p-4f, 0x1.a0cfcp-3f, 0x1.2b05a8p-2f, 0x1.8ea7f2p-2f,                \
        0x1.00da06p-1f, 0x1.491b5ep-1f, 0x1.b913b2p-1f

#endif
