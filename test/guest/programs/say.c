/* say TEXT: prints it. Without a C library, whose start takes longer than all the rest where KVM interprets the guest. */
static void call(long number, long a, const char *b, long c)
{
	__asm__ volatile("syscall" : "+a"(number) : "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
}

/* The stack has the number of arguments, then these: the program's name and the text. */
__attribute__((used)) static void run(char **stack)
{
	char *text = stack[2];
	long length = 0;

	while (text[length])
		length++;
	text[length] = '\n';
	call(1, 1, text, length + 1); /* write */
	call(231, 0, 0, 0); /* exit_group */
}

__asm__(".globl _start\n_start: mov %rsp, %rdi\n\tcall run\n");
