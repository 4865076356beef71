/* host_device.h: PLORA__HOST_DEVICE stands before what both compilers read: plain functions for C, and for kernels. */
#ifndef PLORA_HOST_DEVICE_H
#define PLORA_HOST_DEVICE_H

#ifdef __CUDACC__
#define PLORA__HOST_DEVICE __host__ __device__
#else
#define PLORA__HOST_DEVICE
#endif

#endif
