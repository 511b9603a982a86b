/* Lets user-mode Linux 6.1 run on processors with more registers than it knows.

   It keeps 2,696 bytes of a process's extended state, and gives them back by
   PTRACE_SETREGSET. Since Linux 5.16 a processor with AMX has 11,008 bytes, and the call
   takes all or fails with EFAULT: the guest panics at its first process. Preloaded
   (LD_PRELOAD), this hands over what the guest has kept, followed by what the process
   has now. That is the AMX tiles alone: a process gets those only on request, and the
   guest's arch_prctl(2) knows no such request. */

#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

/* The peeks of libc's ptrace(2) return what the system call stores at an address. */
static long call(int request, pid_t pid, void *address, void *data)
{
	long word;
	int peeks = request == PTRACE_PEEKTEXT || request == PTRACE_PEEKDATA ||
		    request == PTRACE_PEEKUSER;
	long result = syscall(SYS_ptrace, (long)request, (long)pid, address,
			      peeks ? &word : data);

	if (!peeks || result < 0)
		return result;
	errno = 0;
	return word;
}

long ptrace(enum __ptrace_request request, ...)
{
	static char whole[1 << 16] __attribute__((aligned(64)));
	struct iovec *kept, current = { whole, sizeof(whole) };
	va_list rest;
	pid_t pid;
	void *address, *data;
	long result;

	va_start(rest, request);
	pid = va_arg(rest, pid_t);
	address = va_arg(rest, void *);
	data = va_arg(rest, void *);
	va_end(rest);
	result = call(request, pid, address, data);
	if (result == 0 || errno != EFAULT || request != PTRACE_SETREGSET ||
	    (long)address != NT_X86_XSTATE)
		return result;
	kept = data;
	if (call(PTRACE_GETREGSET, pid, address, &current) < 0)
		return -1;
	if (current.iov_len <= kept->iov_len) {
		errno = EFAULT;
		return -1;
	}
	memcpy(whole, kept->iov_base, kept->iov_len);
	return call(PTRACE_SETREGSET, pid, address, &current);
}
