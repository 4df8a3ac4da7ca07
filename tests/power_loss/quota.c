/* Preloaded into a process, reports a full disk as a used-up quota. Real quotas would not do: a kernel may be
 * built without them, and most don't apply to root. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/types.h>
#include <unistd.h>

#define WITH_QUOTA(result, name, parameters, arguments)            \
    result name parameters {                                       \
        result(*next) parameters = dlsym(RTLD_NEXT, #name);        \
        result done = next arguments;                              \
        if (done < 0 && errno == ENOSPC) errno = EDQUOT;           \
        return done;                                               \
    }

WITH_QUOTA(ssize_t, write, (int file, const void *bytes, size_t count), (file, bytes, count))
WITH_QUOTA(ssize_t, pwrite, (int file, const void *bytes, size_t count, off_t at), (file, bytes, count, at))
WITH_QUOTA(ssize_t, pwrite64, (int file, const void *bytes, size_t count, off64_t at), (file, bytes, count, at))
WITH_QUOTA(int, ftruncate, (int file, off_t length), (file, length))
WITH_QUOTA(int, ftruncate64, (int file, off64_t length), (file, length))
WITH_QUOTA(int, fallocate, (int file, int mode, off_t at, off_t length), (file, mode, at, length))
WITH_QUOTA(int, rename, (const char *from, const char *to), (from, to))
/* The caller may omit the mode; `open` then ignores it. */
WITH_QUOTA(int, open, (const char *path, int flags, mode_t mode), (path, flags, mode))
WITH_QUOTA(int, open64, (const char *path, int flags, mode_t mode), (path, flags, mode))
