// Prints src/kvm/generated/abi.ts from the kernel's user-space headers: numbers of ioctls, capabilities and exits, and
// the size and field offsets of every structure tsvisor reads or writes. See scripts/abi/generate.
#include <asm/bootparam.h>
#include <asm/kvm.h>
#include <linux/elf.h>
#include <linux/kvm.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/mman.h>

#include "print.h"

int main(void) {
  GENERATED();
  N(KVM_API_VERSION);

  printf("\n// System, VM and vCPU ioctls (KVM API, section 4).\n");
  N(KVM_GET_API_VERSION); N(KVM_CREATE_VM); N(KVM_CHECK_EXTENSION); N(KVM_GET_VCPU_MMAP_SIZE);
  N(KVM_GET_SUPPORTED_CPUID); N(KVM_GET_MSR_INDEX_LIST);
  N(KVM_SET_USER_MEMORY_REGION); N(KVM_SET_TSS_ADDR); N(KVM_SET_IDENTITY_MAP_ADDR); N(KVM_CREATE_IRQCHIP);
  N(KVM_CREATE_PIT2); N(KVM_CREATE_VCPU); N(KVM_IRQ_LINE); N(KVM_ENABLE_CAP); N(KVM_X86_SET_MSR_FILTER);
  N(KVM_IRQFD); N(KVM_IOEVENTFD); N(KVM_GET_DIRTY_LOG); N(KVM_GET_IRQCHIP); N(KVM_SET_IRQCHIP); N(KVM_GET_PIT2);
  N(KVM_SET_PIT2); N(KVM_GET_CLOCK); N(KVM_SET_CLOCK);
  N(KVM_RUN); N(KVM_GET_REGS); N(KVM_SET_REGS); N(KVM_GET_SREGS); N(KVM_SET_SREGS); N(KVM_GET_FPU); N(KVM_SET_FPU);
  N(KVM_GET_XSAVE); N(KVM_GET_XSAVE2); N(KVM_SET_XSAVE); N(KVM_GET_XCRS); N(KVM_SET_XCRS); N(KVM_GET_MSRS);
  N(KVM_SET_MSRS); N(KVM_GET_VCPU_EVENTS); N(KVM_SET_VCPU_EVENTS); N(KVM_GET_DEBUGREGS); N(KVM_SET_DEBUGREGS);
  N(KVM_SET_GUEST_DEBUG); N(KVM_TRANSLATE); N(KVM_GET_MP_STATE); N(KVM_SET_MP_STATE); N(KVM_GET_LAPIC);
  N(KVM_SET_LAPIC); N(KVM_SET_CPUID2); N(KVM_GET_CPUID2); N(KVM_INTERRUPT); N(KVM_NMI); N(KVM_GET_TSC_KHZ);
  N(KVM_SET_TSC_KHZ); N(KVM_KVMCLOCK_CTRL);

  printf("\n// Capabilities (KVM_CHECK_EXTENSION).\n");
  N(KVM_CAP_IRQCHIP); N(KVM_CAP_USER_MEMORY); N(KVM_CAP_SET_TSS_ADDR); N(KVM_CAP_EXT_CPUID); N(KVM_CAP_NR_VCPUS);
  N(KVM_CAP_MAX_VCPUS); N(KVM_CAP_NR_MEMSLOTS); N(KVM_CAP_PIT2); N(KVM_CAP_SET_IDENTITY_MAP_ADDR); N(KVM_CAP_IRQFD);
  N(KVM_CAP_IOEVENTFD); N(KVM_CAP_XSAVE); N(KVM_CAP_XSAVE2); N(KVM_CAP_XCRS); N(KVM_CAP_SYNC_REGS);
  N(KVM_CAP_IMMEDIATE_EXIT); N(KVM_CAP_X86_USER_SPACE_MSR); N(KVM_CAP_X86_MSR_FILTER); N(KVM_CAP_SET_GUEST_DEBUG);
  N(KVM_CAP_VCPU_EVENTS); N(KVM_CAP_DEBUGREGS); N(KVM_CAP_MP_STATE); N(KVM_CAP_TSC_DEADLINE_TIMER);
  N(KVM_CAP_READONLY_MEM); N(KVM_CAP_COALESCED_PIO); N(KVM_CAP_DIRTY_LOG_RING); N(KVM_CAP_SPLIT_IRQCHIP);
  N(KVM_CAP_TSC_CONTROL); N(KVM_CAP_GET_TSC_KHZ);

  printf("\n// Exit reasons (KVM API, section 5).\n");
  N(KVM_EXIT_UNKNOWN); N(KVM_EXIT_EXCEPTION); N(KVM_EXIT_IO); N(KVM_EXIT_HYPERCALL); N(KVM_EXIT_DEBUG); N(KVM_EXIT_HLT);
  N(KVM_EXIT_MMIO); N(KVM_EXIT_IRQ_WINDOW_OPEN); N(KVM_EXIT_SHUTDOWN); N(KVM_EXIT_FAIL_ENTRY); N(KVM_EXIT_INTR);
  N(KVM_EXIT_SET_TPR); N(KVM_EXIT_TPR_ACCESS); N(KVM_EXIT_NMI); N(KVM_EXIT_INTERNAL_ERROR); N(KVM_EXIT_SYSTEM_EVENT);
  N(KVM_EXIT_IOAPIC_EOI); N(KVM_EXIT_HYPERV); N(KVM_EXIT_X86_RDMSR); N(KVM_EXIT_X86_WRMSR); N(KVM_EXIT_X86_BUS_LOCK);
  N(KVM_EXIT_DIRTY_RING_FULL); N(KVM_EXIT_IO_IN); N(KVM_EXIT_IO_OUT); N(KVM_INTERNAL_ERROR_EMULATION);
  N(KVM_SYSTEM_EVENT_SHUTDOWN); N(KVM_SYSTEM_EVENT_RESET); N(KVM_SYSTEM_EVENT_CRASH);

  printf("\n// Flags.\n");
  N(KVM_MEM_LOG_DIRTY_PAGES); N(KVM_MEM_READONLY); N(KVM_GUESTDBG_ENABLE); N(KVM_GUESTDBG_SINGLESTEP);
  N(KVM_GUESTDBG_USE_HW_BP); N(KVM_GUESTDBG_USE_SW_BP); N(KVM_MSR_EXIT_REASON_FILTER); N(KVM_MSR_FILTER_DEFAULT_ALLOW);
  N(KVM_MSR_FILTER_WRITE); N(KVM_MSR_FILTER_READ); N(KVM_PIT_SPEAKER_DUMMY); N(KVM_PIT_FLAGS_SPEAKER_DATA_ON); N(KVM_SYNC_X86_REGS);
  N(KVM_SYNC_X86_SREGS); N(KVM_SYNC_X86_EVENTS); N(KVM_MP_STATE_RUNNABLE); N(KVM_MP_STATE_HALTED);
  N(KVM_IRQCHIP_PIC_MASTER); N(KVM_IRQCHIP_PIC_SLAVE); N(KVM_IRQCHIP_IOAPIC); N(KVM_VCPUEVENT_VALID_SIPI_VECTOR);
  N(KVM_CPUID_FLAG_SIGNIFCANT_INDEX); N(KVM_VCPUEVENT_VALID_NMI_PENDING); N(KVM_VCPUEVENT_VALID_SHADOW);
  N(EPOLLIN); N(EPOLLOUT); N(EPOLLHUP); N(EPOLLERR);
  N(PROT_READ); N(PROT_WRITE); N(MAP_SHARED); N(MAP_PRIVATE); N(MAP_ANONYMOUS); N(MAP_NORESERVE); N(MADV_HUGEPAGE);

  BEGIN(kvm_run)
  F(request_interrupt_window) F(immediate_exit) F(exit_reason) F(ready_for_interrupt_injection) F(if_flag) F(flags)
  F(cr8) F(apic_base)
  FAS(hw.hardware_exit_reason, "hw_hardware_exit_reason")
  FAS(fail_entry.hardware_entry_failure_reason, "fail_entry_reason")
  FAS(debug.arch.exception, "debug_exception") FAS(debug.arch.pc, "debug_pc") FAS(debug.arch.dr6, "debug_dr6")
  FAS(debug.arch.dr7, "debug_dr7")
  FAS(io.direction, "io_direction") FAS(io.size, "io_size") FAS(io.port, "io_port") FAS(io.count, "io_count")
  FAS(io.data_offset, "io_data_offset")
  FAS(mmio.phys_addr, "mmio_phys_addr") FAS(mmio.data, "mmio_data") FAS(mmio.len, "mmio_len")
  FAS(mmio.is_write, "mmio_is_write")
  FAS(internal.suberror, "internal_suberror") FAS(internal.ndata, "internal_ndata") FAS(internal.data, "internal_data")
  FAS(msr.error, "msr_error") FAS(msr.reason, "msr_reason") FAS(msr.index, "msr_index") FAS(msr.data, "msr_data")
  FAS(system_event.type, "system_event_type")
  F(kvm_valid_regs) F(kvm_dirty_regs) F(s)
  END()
  BEGIN(kvm_sync_regs) F(regs) F(sregs) F(events) END()
  BEGIN(kvm_regs)
  F(rax) F(rbx) F(rcx) F(rdx) F(rsi) F(rdi) F(rsp) F(rbp) F(r8) F(r9) F(r10) F(r11) F(r12) F(r13) F(r14) F(r15) F(rip)
  F(rflags)
  END()
  BEGIN(kvm_segment)
  F(base) F(limit) F(selector) F(type) F(present) F(dpl) F(db) F(s) F(l) F(g) F(avl) F(unusable)
  END()
  BEGIN(kvm_dtable) F(base) F(limit) END()
  BEGIN(kvm_sregs)
  F(cs) F(ds) F(es) F(fs) F(gs) F(ss) F(tr) F(ldt) F(gdt) F(idt) F(cr0) F(cr2) F(cr3) F(cr4) F(cr8) F(efer)
  F(apic_base) F(interrupt_bitmap)
  END()
  BEGIN(kvm_fpu) F(fpr) F(fcw) F(fsw) F(ftwx) F(last_opcode) F(last_ip) F(last_dp) F(xmm) F(mxcsr) END()
  BEGIN(kvm_xcr) F(xcr) F(value) END()
  BEGIN(kvm_xcrs) F(nr_xcrs) F(flags) F(xcrs) END()
  BEGIN(kvm_msr_entry) F(index) F(data) END()
  BEGIN(kvm_msrs) F(nmsrs) F(entries) END()
  BEGIN(kvm_cpuid_entry2) F(function) F(index) F(flags) F(eax) F(ebx) F(ecx) F(edx) END()
  BEGIN(kvm_cpuid2) F(nent) F(entries) END()
  BEGIN(kvm_vcpu_events)
  FAS(exception.injected, "exception_injected") FAS(exception.nr, "exception_nr")
  FAS(exception.has_error_code, "exception_has_error_code") FAS(exception.pending, "exception_pending")
  FAS(exception.error_code, "exception_error_code")
  FAS(interrupt.injected, "interrupt_injected") FAS(interrupt.nr, "interrupt_nr") FAS(interrupt.soft, "interrupt_soft")
  FAS(interrupt.shadow, "interrupt_shadow")
  FAS(nmi.injected, "nmi_injected") FAS(nmi.pending, "nmi_pending") FAS(nmi.masked, "nmi_masked") F(flags)
  END()
  BEGIN(kvm_debugregs) F(db) F(dr6) F(dr7) F(flags) END()
  BEGIN(kvm_guest_debug) F(control) FAS(arch.debugreg, "debugreg") END()
  BEGIN(kvm_translation) F(linear_address) F(physical_address) F(valid) F(writeable) F(usermode) END()
  BEGIN(kvm_mp_state) F(mp_state) END()
  BEGIN(kvm_userspace_memory_region)
  F(slot) F(flags) F(guest_phys_addr) F(memory_size) F(userspace_addr)
  END()
  BEGIN(kvm_irqchip) F(chip_id) F(chip) END()
  BEGIN(kvm_pit_state2) F(channels) F(flags) END()
  BEGIN(kvm_pit_channel_state)
  F(count) F(status_latched) F(status) F(read_state) F(write_state) F(rw_mode) F(mode) F(bcd) F(gate)
  END()
  BEGIN(kvm_clock_data) F(clock) F(flags) F(realtime) F(host_tsc) END()
  BEGIN(kvm_lapic_state) F(regs) END()
  BEGIN(kvm_msr_list) F(nmsrs) F(indices) END()
  BEGIN(kvm_dirty_log) F(slot) F(dirty_bitmap) END()
  BEGIN(kvm_pit_config) F(flags) END()
  BEGIN(kvm_irq_level) F(irq) F(level) END()
  BEGIN(kvm_irqfd) F(fd) F(gsi) F(flags) F(resamplefd) END()
  BEGIN(kvm_ioeventfd) F(datamatch) F(addr) F(len) F(fd) F(flags) END()
  BEGIN(kvm_enable_cap) F(cap) F(flags) F(args) END()
  BEGIN(kvm_msr_filter_range) F(flags) F(nmsrs) F(base) F(bitmap) END()
  BEGIN(kvm_msr_filter) F(flags) F(ranges) END()

  printf("\n// Linux boot protocol (Documentation/arch/x86/boot.rst, zero-page.rst).\n");
  N(E820_MAX_ENTRIES_ZEROPAGE); N(LOADED_HIGH); N(CAN_USE_HEAP); N(XLF_KERNEL_64); N(XLF_CAN_BE_LOADED_ABOVE_4G);
  BEGIN(setup_header)
  F(setup_sects) F(root_flags) F(syssize) F(ram_size) F(vid_mode) F(root_dev) F(boot_flag) F(jump) F(header) F(version)
  F(realmode_swtch) F(start_sys_seg) F(kernel_version) F(type_of_loader) F(loadflags) F(setup_move_size) F(code32_start)
  F(ramdisk_image) F(ramdisk_size) F(bootsect_kludge) F(heap_end_ptr) F(ext_loader_ver) F(ext_loader_type)
  F(cmd_line_ptr) F(initrd_addr_max) F(kernel_alignment) F(relocatable_kernel) F(min_alignment) F(xloadflags)
  F(cmdline_size) F(hardware_subarch) F(hardware_subarch_data) F(payload_offset) F(payload_length) F(setup_data)
  F(pref_address) F(init_size) F(handover_offset) F(kernel_info_offset)
  END()
  BEGIN(boot_params)
  F(screen_info) F(acpi_rsdp_addr) F(ext_ramdisk_image) F(ext_ramdisk_size) F(ext_cmd_line_ptr) F(e820_entries)
  F(eddbuf_entries) F(sentinel) F(hdr) F(e820_table)
  END()
  BEGIN(boot_e820_entry) F(addr) FAS(size, "length") F(type) END()

  printf("\n// ELF (System V gABI; linux/elf.h).\n");
  N(ET_EXEC); N(ET_DYN); N(EM_386); N(EM_X86_64); N(PT_LOAD); N(PT_INTERP); N(PT_NOTE);
  BEGIN(elf64_hdr) F(e_ident) F(e_type) F(e_machine) F(e_entry) F(e_phoff) F(e_phentsize) F(e_phnum) END()
  BEGIN(elf64_phdr) F(p_type) F(p_offset) F(p_vaddr) F(p_paddr) F(p_filesz) F(p_memsz) F(p_align) END()
  BEGIN(elf32_hdr) F(e_ident) F(e_type) F(e_machine) F(e_entry) F(e_phoff) F(e_phentsize) F(e_phnum) END()
  BEGIN(elf32_phdr) F(p_type) F(p_offset) F(p_vaddr) F(p_paddr) F(p_filesz) F(p_memsz) F(p_align) END()
  return 0;
}
